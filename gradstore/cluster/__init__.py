"""A Ray cluster for the length of a call."""
