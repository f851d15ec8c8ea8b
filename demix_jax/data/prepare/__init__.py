"""`demix prepare`: sources of text become token files."""
