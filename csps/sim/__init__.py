"""Servers on a virtual clock: the real schedulers, with steps timed by a model of a cluster."""
