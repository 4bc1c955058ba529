"""Influence by replay: the exact derivative of a training run's outcome by its rows' weights."""
