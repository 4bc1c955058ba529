"""Capture of per-sample gradients: hooks, losses, and restoring the model's original state."""
