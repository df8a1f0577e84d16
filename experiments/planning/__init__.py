"""What to run next, from the records alone."""
