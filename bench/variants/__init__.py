"""Variants of the CUDA engine, timed alone."""
