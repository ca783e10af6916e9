"""Sweeps: every combination of a few settings as a run of its own, started together and compared at the end."""
