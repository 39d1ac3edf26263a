"""Experiments: modules whose config() returns a TrainConfig."""
