"""The train step and everything around it."""
