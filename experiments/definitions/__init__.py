"""The tables and figures as data: what the paper claims, and which runs they need."""
