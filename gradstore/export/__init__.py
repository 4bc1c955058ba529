"""Exporting features: a model and rows become projected rows of units."""
