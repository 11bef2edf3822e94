"""What is measured, how, and against whom: of the command `c3a-triton bench` and of the repository's own benchmarks."""
