"""results/index.html, the page of all results: one file that works from disk."""
