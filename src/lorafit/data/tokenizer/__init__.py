"""Tokenizer: a base's tokenizer, without torch or transformers in this process."""
