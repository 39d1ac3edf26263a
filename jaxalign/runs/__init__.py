"""A run: from a config to a folder with checkpoints, metrics, a report and an exported model."""
