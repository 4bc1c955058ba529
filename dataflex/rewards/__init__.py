"""Rewards: how good a sampled response is, 0 to 1. One backend, one file."""
