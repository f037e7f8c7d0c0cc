"""Attention: causal attention over packed rows."""
