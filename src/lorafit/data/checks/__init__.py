"""Checks of rows: alone, tokenised, and as a whole set."""
