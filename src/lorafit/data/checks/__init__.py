"""What is judged of rows: alone, tokenised, and as a whole set."""
