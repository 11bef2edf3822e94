"""One host file per file of `kernels/`, and what they share: plans, checks, tiles."""
