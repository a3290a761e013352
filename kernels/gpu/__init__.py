"""The machinery of the Triton kernels: launch parameters and matrix tiles."""
