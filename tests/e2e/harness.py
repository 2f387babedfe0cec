"""Starts the real server for tests, in float32, and talks to it."""
