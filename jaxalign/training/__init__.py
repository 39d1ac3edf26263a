"""Training: state, the compiled step, the loop, optimisers, checkpoints and metrics."""
