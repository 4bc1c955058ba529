"""Projections on a CUDA device by Triton kernels: the random matrix never reaches memory."""
