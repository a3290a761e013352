"""The machinery of the CPU: numba kernels, how they are compiled and kept, how threads wait."""
