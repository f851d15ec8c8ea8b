"""Mixing experts by their posterior; arrays in, arrays out."""
