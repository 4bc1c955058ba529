"""Rows of a run: their order, mixture and images."""
