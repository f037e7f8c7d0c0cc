"""initial: the weights that fresh adapters begin with."""
