"""Gradient entanglement of margin losses (arXiv:2410.13828): the theory and the studies."""
