"""Imports of TensorFlow, which would print dozens of lines and take the accelerators' memory."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from demix_jax.errors import DemixError


@contextlib.contextmanager
def quiet_stderr() -> Iterator[None]:
    """Discards what is printed on standard error; exceptions still come through."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def quiet_import(library: str) -> Iterator[None]:
    """Silences imports in this block; raises DemixError if `library` is not installed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with quiet_stderr():
            yield
    except ImportError as error:
        raise DemixError(
            f"this source of text needs {library}, which cannot be imported ({error}); "
            "install it with: pip install 'demix_jax[data]'"
        ) from error


def import_tensorflow() -> Any:
    """Imports TensorFlow, which reads files and leaves the accelerators to JAX."""
    with quiet_import("TensorFlow"):
        import tensorflow as tf

        with contextlib.suppress(RuntimeError):  # someone else has set it up already
            tf.config.set_visible_devices([], "GPU")
    return tf
