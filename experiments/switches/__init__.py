"""Losses of pairs crossed with the switches of the preference stage."""
