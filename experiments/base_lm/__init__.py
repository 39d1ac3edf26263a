"""A base model of our own, pretrained on real text."""
