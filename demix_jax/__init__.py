"""demix_jax: modular language models whose feed-forward experts are text domains."""

__version__ = "0.1.0"
