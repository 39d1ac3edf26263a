"""The contestants of the benchmarks: scripts, each run in a process and environment of its own."""
