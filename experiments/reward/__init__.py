"""Reward models and pairwise preference models, and what the latter can express alone."""
