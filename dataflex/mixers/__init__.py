"""Mixers: in what proportions domains are trained on; one strategy a file."""
