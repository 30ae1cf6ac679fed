"""Chunkwise matrix algebra in plain torch, for CPU tensors."""
