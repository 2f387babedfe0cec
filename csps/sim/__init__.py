"""Runs a trace on a cluster that is not there: the real schedulers on a virtual clock."""
