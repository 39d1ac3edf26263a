"""Preference data from models, and what DPO learns of it."""
