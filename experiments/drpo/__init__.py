"""Alignment without training, by prompt search (arXiv:2411.08733)."""
