"""The dense Rademacher projection on a CUDA device, by Triton kernels: signs never reach memory."""
