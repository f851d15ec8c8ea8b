"""Exceptions that become one line."""

import jax.numpy as jnp
import numpy as np
import pytest

from demix_jax.errors import DemixError, explain_memory


def test_out_of_memory_names_a_way_out():
    def full(error: Exception) -> None:
        raise error

    compiling = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error.\nUsed 20G of 16G"
    for call in (
        lambda: jnp.ones(10**14).block_until_ready(),
        lambda: np.ones(10**15),
        lambda: bytearray(10**18),
        lambda: full(MemoryError()),
        lambda: full(RuntimeError(compiling)),
        lambda: full(ValueError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY: out of memory")),
    ):
        line = r"^out of memory \(.+\): take less$"
        with pytest.raises(DemixError, match=line) as error, explain_memory("take less"):
            call()
        assert "\n" not in str(error.value)


def test_other_errors_pass():
    for other in (RuntimeError("INTERNAL: else"), DemixError("no space"), KeyError("out")):
        with pytest.raises(type(other)) as error, explain_memory("take less"):
            raise other
        assert error.value is other
