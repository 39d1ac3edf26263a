"""Language models behind one interface, texts in and texts out: here, behind HTTP, scripted."""

from jaxalign.backends.interface import Backend, Decoding, Generation, Prompt, Score

__all__ = ["Backend", "Decoding", "Generation", "Prompt", "Score"]
