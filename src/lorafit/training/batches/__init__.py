"""Batches: the examples of each step, laid out as micro-batches and made ahead of time."""
