"""Triton kernels, each with a torch twin and a parity test; imports no csps."""
