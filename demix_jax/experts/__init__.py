"""The life of an expert: adapt, add, remove, rename, merge, import, export, verify."""
