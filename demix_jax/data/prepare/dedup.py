"""Removal of duplicate documents in a domain: signatures of each part, then one decision.

Two documents are exact copies when they hold the same words: texts are compared as
`" ".join(text.split())`, so runs of Unicode whitespace count as one space and nothing else is
changed. Their keys are 128 bits of BLAKE2b. Two documents are near copies when the sets of their
word 5-grams are alike: their Jaccard similarity is estimated from 128 MinHash values (standard
error 0.035 at 0.8). Text without spaces between words has no 5-grams, so only its copies are found.

Documents are considered in the order test, valid, train, then part, then position, and a document
is dropped when one before it was kept and is a copy of it. Held-out text therefore stays and its
copies leave the training split. The decision depends on the documents and their order alone: not on
how they are cut into parts, nor on who computes which part.

Near copies are looked up by bands of MinHash values (locality-sensitive hashing), so a pair that
lies exactly at the threshold is overlooked with a probability below 5 %, a closer one less often.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from demix_jax.data.sources.base import SPLITS
from demix_jax.errors import DemixError

NUM_PERM = 128  # MinHash values of a document
_WORDS = 5  # in a gram
_GRAMS = 512  # hashed at once: bounds memory, and stays in the processor's cache
_FORMAT = "demix signatures 1: blake2b-128; crc32 of word 5-grams, datasketch affine32, seed 1"
_BUCKET = 2**22  # keys sorted at once, about
_BLOCK = 256  # documents looked up at once
_PAIRS = 2**15  # documents compared at once, about
_FILES = 128  # kept open at once
_NUMBER = np.uint64(2**32 - 1)  # the half of an index entry that is a document's number
_NONE = 2**63 - 1  # in the place of a document
_MIX = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True)
class Signatures:
    """The hashes by which a part's n documents are compared, in the part's order.

    Attributes:
        splits: [n] uint8, an index into `base.SPLITS`.
        keys: [n, 2] uint64, equal for exact copies.
        digests: [n, NUM_PERM] uint32 MinHash values; [n, 0] to find only exact copies.
    """

    splits: np.ndarray
    keys: np.ndarray
    digests: np.ndarray

    def __len__(self) -> int:
        return len(self.splits)

    @property
    def near(self) -> bool:
        """Returns True if near copies can be found."""
        return self.digests.shape[1] > 0

    def save(self, path: Path) -> None:
        """Writes a file of 17 bytes a document, 529 with MinHash values."""
        with path.open("wb") as file:
            for array in (np.array(_FORMAT), self.digests, self.keys, self.splits):
                np.save(file, array, allow_pickle=False)  # the widest first: all are aligned

    @classmethod
    def load(cls, path: Path) -> "Signatures":
        """Maps a saved file into memory; raises DemixError if it is missing or damaged."""
        try:
            with path.open("rb") as file:
                whole = np.memmap(file, np.uint8, mode="r")  # one mapping is one open file
                file.seek(0)
                if str(_next_array(file, whole)) != _FORMAT:
                    raise ValueError("another format")
                digests, keys, splits = (_next_array(file, whole) for _ in range(3))
                return cls(splits, keys, digests)
        except FileNotFoundError:
            raise DemixError(
                f"no signatures in {path}; run `demix prepare` again to make them"
            ) from None
        except OSError:
            raise
        except Exception as error:  # NumPy raises many kinds
            raise DemixError(
                f"{path} does not hold document signatures ({error}); delete it and run "
                "`demix prepare` again"
            ) from error


class SplitCounts(NamedTuple):
    """The number of documents in a split, and of those dropped for each reason.

    A dropped document is "within" when the document kept instead of it (for near copies, the
    earliest one) is in the same split, else "across". A copy of a document that is itself dropped
    as a near copy counts as exact.
    """

    documents: int
    exact_within: int
    exact_across: int
    near_within: int
    near_across: int


DuplicateCounts = dict[str, SplitCounts]  # by the name of the split


def compute_signatures(documents: Iterable[tuple[str, str]], near: bool) -> Signatures:
    """Computes the signatures of a part, equal on every machine; memory holds one document.

    Args:
        documents: (split, text) of each document; those whose text is empty are left out.
        near: True to compute MinHash values; raises DemixError if datasketch is not installed.
    """
    minhash = _make_minhash() if near else None
    splits, keys, digests = bytearray(), bytearray(), bytearray()
    for split, text in documents:
        if not text:
            continue
        normal = " ".join(text.split()).encode(errors="surrogatepass")
        splits.append(SPLITS.index(split))
        keys += hashlib.blake2b(normal, digest_size=16).digest()
        if minhash is not None:
            digests += _digest(minhash, normal)
    count = len(splits)
    return Signatures(
        np.frombuffer(splits, np.uint8),
        np.frombuffer(keys, "<u8").reshape(count, 2),
        np.frombuffer(digests, "<u4").reshape(count, NUM_PERM if near else 0),
    )


def find_duplicates(
    parts: Sequence[Signatures | Path], near: bool, threshold: float = 0.8
) -> tuple[list[np.ndarray], DuplicateCounts]:
    """Decides which documents of a domain to drop; see the module for the rule.

    Memory is 2 bytes a document, and up to 400 MB while exact copies are sought. Near copies are
    found by an index of 8 bytes a band and 8 more for each document that is kept: 152 bytes at a
    threshold of 0.8 (18 bands), 344 at 0.5 (42 bands). MinHash values stay in their files.

    Args:
        parts: signatures of every part of the domain, or the files that hold them.
        near: True to drop near copies too.
        threshold: estimated Jaccard similarity from which on documents are near copies.

    Returns:
        For each part [n] bool, true for the documents to drop; and the counts.

    Raises:
        DemixError: a threshold outside 0.5 to 1, a file that cannot be read, or `near` of
            signatures that were computed without.
    """
    if near and not 0.5 <= threshold <= 1:
        raise DemixError(
            f"near copies from a similarity of {threshold} on were asked for; use 0.5 to 1"
        )
    domain = _Domain(parts, near)
    _drop_exact(domain)
    if near:
        _drop_near(domain, threshold)
    spans = itertools.pairwise(domain.starts)
    return [domain.drop[start:end] for start, end in spans], domain.count()


def common_documents(
    keys: Mapping[str, Callable[[], Iterable[np.ndarray]]],
) -> dict[tuple[str, str], int]:
    """Counts the distinct documents of each pair of domains that share any.

    Args:
        keys: for each domain a function that yields [n] uint64 arrays with a key of each document,
            equal for equal documents; it is called several times, to need little memory.
    """
    names = list(keys)
    total = np.zeros((len(names), len(names)), np.int64)
    buckets = 1 + sum(len(array) for read in keys.values() for array in read()) // _BUCKET
    empty = np.zeros(0, np.uint64)
    for bucket in range(buckets):
        by_domain = []
        for read in keys.values():
            parts = (array[array % np.uint64(buckets) == bucket] for array in read())
            by_domain.append(np.unique(np.concatenate([empty, *parts])))
        distinct, counts = np.unique(np.concatenate([empty, *by_domain]), return_counts=True)
        shared = distinct[counts > 1]
        present = [np.isin(shared, ours, assume_unique=True) for ours in by_domain]
        indicator = np.array(present, np.int64).reshape(len(names), len(shared))
        total += indicator @ indicator.T
    pairs = itertools.combinations(range(len(names)), 2)
    return {(names[i], names[j]): int(total[i, j]) for i, j in pairs if total[i, j]}


def _make_minhash() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise DemixError(
            "finding near copies of documents needs the package datasketch, which is not "
            "installed; pip install 'demix_jax[dedup]', or drop exact copies only"
        ) from error
    return datasketch.MinHash(NUM_PERM, seed=1, hashfunc=zlib.crc32, scheme="affine32")


def _digest(minhash: Any, normal: bytes) -> bytes:
    """Computes MinHash values of the word 5-grams; of the whole text if it has fewer words."""
    words = normal.split(b" ")
    minhash.clear()
    for start in range(0, max(1, len(words) - _WORDS + 1), _GRAMS):
        block = words[start : start + _GRAMS + _WORDS - 1]
        shifted = (block[i:] for i in range(_WORDS))
        grams = [b" ".join(gram) for gram in zip(*shifted, strict=False)]
        minhash.update_batch(grams or [normal])
    return minhash.hashvalues.astype("<u4").tobytes()


def _next_array(file: BinaryIO, whole: np.ndarray) -> np.ndarray:
    """Returns the next array of a file of arrays, from its mapping; seeks to the array's end."""
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    start = file.tell()
    end = file.seek(start + math.prod(shape) * dtype.itemsize)
    return whole[start:end].view(dtype).reshape(shape)


class _Domain:
    """The documents of all parts, numbered from 0 on.

    Attributes:
        starts: [parts + 1] int64, number of each part's first document, and of all documents.
        splits: [documents] uint8, index into `base.SPLITS`.
        drop: [documents] bool, true for those to leave out.
        tally: [splits, 4] int64, last four fields of SplitCounts.
    """

    def __init__(self, parts: Sequence[Signatures | Path], near: bool) -> None:
        self._parts = parts
        self._load = functools.lru_cache(_FILES)(Signatures.load)
        splits, sizes = [np.zeros(0, np.uint8)], [0]
        for i, part in enumerate(self):
            if near and not part.near:
                raise DemixError(
                    f"near copies were asked for, but the signatures of part {i} are for exact "
                    "copies only; delete the signatures and run `demix prepare` again"
                )
            splits.append(np.array(part.splits))
            sizes.append(len(part))
        self.starts = np.cumsum(sizes)
        self.splits = np.concatenate(splits)
        self.drop = np.zeros(len(self.splits), bool)
        self.tally = np.zeros((len(SPLITS), 4), np.int64)

    def __getitem__(self, part: int) -> Signatures:
        signatures = self._parts[part]
        return signatures if isinstance(signatures, Signatures) else self._load(signatures)

    def __iter__(self) -> Iterator[Signatures]:
        return (self[i] for i in range(len(self._parts)))

    def mark(self, copies: np.ndarray, kept: np.ndarray, column: int) -> None:
        """Drops the documents `copies` in favour of the documents `kept`."""
        self.drop[copies] = True
        splits = self.splits[copies]
        across = splits != self.splits[kept]
        np.add.at(self.tally, (splits, column + across), 1)

    def digests(self, numbers: np.ndarray) -> np.ndarray:
        """Returns MinHash values of documents, [len(numbers), NUM_PERM] uint32."""
        digests = np.empty((len(numbers), NUM_PERM), np.uint32)
        part_of = np.searchsorted(self.starts, numbers, side="right") - 1
        for i in np.unique(part_of):
            here = part_of == i
            digests[here] = self[i].digests[numbers[here] - self.starts[i]]
        return digests

    def blocks(self) -> Iterator[np.ndarray]:
        """Yields numbers of the documents not dropped, in the order in which they are compared."""
        waiting = np.zeros(0, np.int64)
        for split in reversed(range(len(SPLITS))):
            for start, end in itertools.pairwise(self.starts):
                here = (self.splits[start:end] == split) & ~self.drop[start:end]
                waiting = np.concatenate([waiting, start + np.flatnonzero(here)])
                while len(waiting) >= _BLOCK:
                    yield waiting[:_BLOCK]
                    waiting = waiting[_BLOCK:]
        if len(waiting):
            yield waiting

    def count(self) -> DuplicateCounts:
        sizes = np.bincount(self.splits, minlength=len(SPLITS))
        return {
            name: SplitCounts(int(sizes[i]), *map(int, self.tally[i]))
            for i, name in enumerate(SPLITS)
        }


def _drop_exact(domain: _Domain) -> None:
    """Drops all but the first of equal documents, one bucket of the keys at a time."""
    buckets = 1 + len(domain.splits) // _BUCKET
    for bucket in range(buckets):
        pieces = [(np.zeros((0, 2), np.uint64), np.zeros(0, np.int64))]
        for start, part in zip(domain.starts, domain, strict=False):
            chosen = np.flatnonzero(part.keys[:, 0] % np.uint64(buckets) == bucket)
            pieces.append((part.keys[chosen], start + chosen))
        keys, numbers = (np.concatenate(column) for column in zip(*pieces, strict=True))
        rank = len(SPLITS) - domain.splits[numbers]
        order = np.lexsort((rank, keys[:, 0], keys[:, 1]))  # stable: equals stay in order
        keys, numbers = keys[order], numbers[order]
        is_copy = np.append(False, (keys[1:] == keys[:-1]).all(axis=1))[: len(keys)]
        first = np.maximum.accumulate(np.where(is_copy, 0, np.arange(len(keys))))
        domain.mark(numbers[is_copy], numbers[first[is_copy]], column=0)


def _drop_near(domain: _Domain, threshold: float) -> None:
    """Drops each document that is like one kept before; a block of documents at a time."""
    rows = _rows_of_band(threshold)
    needed = math.ceil(threshold * NUM_PERM - 1e-9)
    index = _Index()
    kept = np.zeros(int((~domain.drop).sum()), np.int64)  # numbers; the index knows their places
    count = 0
    for numbers in domain.blocks():
        digests = domain.digests(numbers)
        keys = _band_keys(digests, rows)
        first = np.full(len(numbers), _NONE)
        for mine, theirs in index.candidates(keys):
            alike = _alike(digests[mine], domain.digests(kept[theirs]), needed)
            np.minimum.at(first, mine[alike], theirs[alike])
        is_new = first == _NONE
        domain.mark(numbers[~is_new], kept[first[~is_new]], column=2)
        numbers, digests, keys = numbers[is_new], digests[is_new], keys[is_new]
        first = _first_inside(digests, keys, needed)
        is_new = first == _NONE
        domain.mark(numbers[~is_new], numbers[first[~is_new]], column=2)
        numbers = numbers[is_new]
        kept[count : count + len(numbers)] = numbers
        index.add(keys[is_new], count)
        count += len(numbers)


def _first_inside(digests: np.ndarray, keys: np.ndarray, needed: int) -> np.ndarray:
    """Returns for each document of a block the first kept one that it is like, or _NONE: [n]."""
    block = _Index()
    block.add(keys, 0)
    first = np.full(len(digests), _NONE)
    for mine, theirs in block.candidates(keys):
        mine, theirs = mine[theirs < mine], theirs[theirs < mine]
        later, starts = np.unique(mine, return_index=True)
        for i, earlier in zip(later, np.split(theirs, starts[1:]), strict=False):
            if first[i] == _NONE:
                earlier = earlier[first[earlier] == _NONE]
                alike = np.flatnonzero(_alike(digests[earlier], digests[i], needed))
                first[i] = earlier[alike[0]] if alike.size else _NONE
    return first


def _alike(left: np.ndarray, right: np.ndarray, needed: int) -> np.ndarray:
    return np.count_nonzero(left == right, axis=1) >= needed


def _rows_of_band(threshold: float) -> int:
    """Returns the most rows of a band that still find 95 % of the pairs at the threshold."""

    def recall(rows: int) -> float:
        return 1 - (1 - threshold**rows) ** (NUM_PERM // rows)

    return max(rows for rows in range(1, NUM_PERM + 1) if recall(rows) >= 0.95)


def _band_keys(digests: np.ndarray, rows: int) -> np.ndarray:
    """Hashes each band of `rows` values into the upper half of a word: [n, bands] uint64."""
    bands = NUM_PERM // rows
    values = digests[:, : bands * rows].reshape(len(digests), bands, rows).astype(np.uint64)
    keys = np.zeros((len(digests), bands), np.uint64)
    for row in range(rows):
        keys = (keys + values[:, :, row]) * _MIX
        keys ^= keys >> np.uint64(32)
    return keys & ~_NUMBER


class _Index:
    """An index of documents by band keys, 8 bytes a band: sorted arrays of key and number.

    Each addition makes a run of its own; runs of like length are merged, so that there are few.
    """

    def __init__(self) -> None:
        self._runs: list[list[np.ndarray]] = []  # [run][band], sorted uint64

    def add(self, keys: np.ndarray, number: int) -> None:
        """Adds documents by their keys [n, bands], numbered from `number` on."""
        if not len(keys):
            return
        numbers = np.arange(number, number + len(keys), dtype=np.uint64)
        run = [np.sort(column | numbers) for column in keys.T]
        while self._runs and len(self._runs[-1][0]) <= 2 * len(run[0]):
            last = self._runs.pop()
            for band in range(len(run)):  # one by one, so that only one is in memory twice
                run[band] = np.concatenate([last[band], run[band]])
                run[band].sort()
                last[band] = run[band][:0]
        self._runs.append(run)

    def candidates(self, keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the pairs of a row of `keys` and a document that share a band, each once."""
        spans = []
        for band, entries in ((b, e) for run in self._runs for b, e in enumerate(run)):
            low = np.searchsorted(entries, keys[:, band])
            high = np.searchsorted(entries, keys[:, band] | _NUMBER, side="right")
            spans.append((entries, low, high))
        total = sum(int((high - low).sum()) for _, low, high in spans)
        if total > _PAIRS and len(keys) > 1:
            half = len(keys) // 2
            yield from self.candidates(keys[:half])
            for mine, theirs in self.candidates(keys[half:]):
                yield mine + half, theirs
        elif total:
            pairs = np.unique(np.concatenate([_expand(*span) for span in spans]))
            for block in np.split(pairs, range(_PAIRS, len(pairs), _PAIRS)):
                yield (block >> np.uint64(32)).astype(np.int64), (block & _NUMBER).astype(np.int64)


def _expand(entries: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Returns all pairs of a row and an entry of its span, as row << 32 | document: uint64."""
    sizes = high - low
    rows = np.repeat(np.arange(len(low), dtype=np.uint64), sizes)
    offsets = np.arange(sizes.sum()) + np.repeat(low - np.cumsum(sizes) + sizes, sizes)
    return (rows << np.uint64(32)) | (entries[offsets] & _NUMBER)
