"""The loss over the vocabulary, in chunks."""
