"""Sends a trace to a live server, on the trace's clock, and records what came back."""
