"""How per-sample gradients are taken: hooks, losses, and the way back to the model as it was."""
