"""A server: completions over HTTP, experts that come and go, a page."""
