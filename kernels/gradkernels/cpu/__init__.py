"""The fast path on a CPU: numba kernels on worker threads of our own."""
