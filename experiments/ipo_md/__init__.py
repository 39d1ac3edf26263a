"""IPO and its online forms (arXiv:2310.12036, arXiv:2403.08635): exact worlds first."""
