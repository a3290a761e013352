"""Benchmarks: every number that the README quotes comes from a command of this package."""
