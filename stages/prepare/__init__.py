"""Documents in, clean token rows out."""
