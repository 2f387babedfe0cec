"""Immutable values every other package speaks in. Standard library only."""
