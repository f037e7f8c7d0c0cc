"""Skeleton: a model on the meta device, from which planning reads sizes and the memory of recurrent layers."""
