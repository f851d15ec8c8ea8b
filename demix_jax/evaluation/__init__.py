"""Experts and their mixtures on held-out text and on texts of unknown domain."""
