"""Selectors: which rows the next steps train on. One strategy, one file."""
