"""Engines: a network made ready to run, and the sampling loops over it."""
