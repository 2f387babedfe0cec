"""Attention over KV that several ranks hold: exact partials merged by log-sum-exp."""
