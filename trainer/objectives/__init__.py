"""Objectives: sums over the clips of a micro-batch, never means."""
