"""Measurements of a real server, each with its command, commit and machine in its JSON."""
