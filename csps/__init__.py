"""CSPS: serving language models whose prompts are long documents."""

__version__ = "0.1.0"
