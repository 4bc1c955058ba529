"""Checkpoints of a run: their folders, state and weights."""
