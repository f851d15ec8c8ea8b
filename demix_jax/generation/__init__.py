"""Decoding under a live posterior: text that experts write together."""
