"""Benchmarks: every number that the README quotes comes from a command of this package."""

import kernels as kernels  # loads torch as it must be loaded, before a benchmark does
