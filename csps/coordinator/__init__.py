"""The front of the server: requests in, steps planned, tokens out. Never touches torch."""
