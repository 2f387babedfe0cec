"""What the kernels compute, in plain torch and fp32: for tests, at test sizes."""
