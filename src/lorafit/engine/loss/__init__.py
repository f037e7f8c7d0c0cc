"""Loss: cross entropy over the vocabulary, in chunks."""
