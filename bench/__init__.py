"""Training runs, demo and benchmarks; run from the repository, not installed with the library."""
