"""Frozen linears on packed weights, and the kernels that unpack them."""
