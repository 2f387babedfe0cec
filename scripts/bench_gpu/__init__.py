"""Measures the GPU path on one GPU: `make bench-gpu`, docs/results/gpu/README.md."""
