"""Representation alignment (RAHF) beside SFT, HIR, DPO and the regularised policy gradient."""
