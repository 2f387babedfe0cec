"""The decoder and its weights: runs alone on one rank, or as one tensor-parallel part."""
