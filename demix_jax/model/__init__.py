"""The one-domain transformer, the split of its parameters, and the optimizer."""
