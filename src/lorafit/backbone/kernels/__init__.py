"""Kernels: frozen linears on packed weights, and kernels that dequantize them."""
