"""Checkpoints: one Orbax item per concern and per expert, and the run folders around them."""
