"""One command for a GPU: correctness first, then speed and memory (`python -m benchmarks.gpu`)."""
