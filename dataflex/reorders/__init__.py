"""Reorders: in which order all rows are trained on; one strategy a file."""
