"""Triton kernels for block-circulant products: Triton only, no torch. Installed as `c3a_triton.kernels`."""
