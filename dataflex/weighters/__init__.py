"""Weighters: which samples of an optimizer step count more; one strategy a file."""
