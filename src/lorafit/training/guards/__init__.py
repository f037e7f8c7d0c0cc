"""Guards: what a run does when memory, numbers or bits go bad."""
