"""New tokens: a base grown by tokens that its tokenizer lacks. No torch."""
