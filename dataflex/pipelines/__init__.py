"""Pipelines: several strategies of different kinds in one run (train_type dynamic_lego)."""
