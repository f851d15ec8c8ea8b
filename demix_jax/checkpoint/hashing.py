"""Content hashes: digests of the name, dtype, shape and bytes of every leaf, combined."""

import hashlib
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np


def hash_leaves(leaves: Iterable[tuple[str, np.ndarray]]) -> str:
    """Returns a hex digest (128 bits) of leaves that come one at a time, sorted by name."""
    digests, pending = [], deque[Future[bytes]]()
    with ThreadPoolExecutor(2) as pool:
        for name, leaf in leaves:  # the next one is read meanwhile, and no more: they are large
            pending.append(pool.submit(leaf_digest, name, leaf))
            if len(pending) > 2:
                digests.append(pending.popleft().result())
        return combine([*digests, *(digest.result() for digest in pending)])


def leaf_digest(name: str, leaf: np.ndarray) -> bytes:
    """Returns the digest of a leaf."""
    leaf = np.ascontiguousarray(leaf).reshape(np.shape(leaf))
    digest = begin_digest(name, leaf.dtype, leaf.shape)
    if leaf.size:
        digest.update(leaf.reshape(-1).data.cast("B"))
    return digest.digest()


def begin_digest(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> Any:
    """Returns the digest of a leaf before its bytes."""
    return hashlib.sha256(f"{name} {dtype} {shape}\0".encode())


def combine(digests: Iterable[bytes]) -> str:
    """Returns the hash of leaves whose digests are given, sorted by name."""
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]
