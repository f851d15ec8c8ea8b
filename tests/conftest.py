"""What every test runs under."""

import jax_setup  # noqa: F401
