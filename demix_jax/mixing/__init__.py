"""The posterior over experts; arrays in, arrays out."""
