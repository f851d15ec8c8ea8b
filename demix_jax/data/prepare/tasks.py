"""The work of `demix prepare` on one part of a domain, for whichever runner does it.

A task is pickled, sent to a worker, and run; it writes its output into the store, whole or not at
all, so that a task whose output is there is done. Its output depends on the task alone.
"""

import abc
import contextlib
import dataclasses
import errno
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from demix_jax.data.prepare.dedup import compute_signatures
from demix_jax.data.prepare.storage import Store
from demix_jax.data.sources.base import SPLITS, BadRecords, Document, Part, hash_split
from demix_jax.data.token_files import TokenWriter, counts_name, index_name, token_dtype, token_name
from demix_jax.data.tokenizers import (
    RoundTrip,
    Tokenizer,
    load_tokenizer,
    measure_round_trip,
    read_meta,
)
from demix_jax.errors import DemixError
from demix_jax.typed_files import read_array

_BATCH = 256  # documents tokenized at once, at most
_BATCH_BYTES = 1 << 20  # of text in them, unless one alone is longer


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """A piece of work on one part of a domain.

    Attributes:
      domain: name of the domain.
      number: index of the part.
      part: text to read.
      build: folder to write to.
      allowed: number of broken records that may be skipped.
    """

    domain: str
    number: int
    part: Part
    build: Store
    allowed: int

    @property
    def size(self) -> int:
        """Returns about how many bytes there are to read."""
        return self.part.size

    @property
    @abc.abstractmethod
    def output(self) -> str:
        """Returns the name of the file that is written last: the task is done if it exists."""

    @abc.abstractmethod
    def run(self) -> None:
        """Writes the output; raises DemixError for errors of the text or the disk."""

    @property
    def is_done(self) -> bool:
        """Returns True if the output exists."""
        return self.build.exists(self.output)

    def fail(self, error: DemixError) -> None:
        """Writes the error to a file, for the process that started the task elsewhere."""
        self.build.write_json(_error_name(self.number), {"error": str(error)})

    def failure(self) -> str | None:
        """Returns the error that `fail` wrote, if any."""
        return self.build.read_json(_error_name(self.number)).get("error")


@dataclasses.dataclass(frozen=True)
class Tokenize(Task):
    """A task that writes the token files of one part.

    Attributes:
      root: folder of the prepared data, which has the tokenizer.
      deduplicated: True if a mask of documents to leave out exists, see `drop_name`.
    """

    root: Store
    deduplicated: bool = False

    @property
    def output(self) -> str:
        """Returns the file that is written last."""
        return counts_name(self.number)

    def run(self) -> None:
        """Writes the output."""
        broken = BadRecords(self.allowed)
        with error_context(self.domain), contextlib.ExitStack() as files:
            folder = self.root.fetch("tokenizer")
            tokenizer = _load_tokenizer(folder, read_meta(folder).get("hash"))
            documents = _with_splits(self._documents(broken))
            writers = {split: self._writer(split, tokenizer, files) for split in SPLITS}
            round_trip = RoundTrip()
            for batch in _batches(documents):
                texts = [text for text, _, _ in batch]
                ids = tokenizer.encode_batch(texts)
                # Of the first batch all is decoded, of others one document.
                sample = texts[:1] if round_trip.documents else texts
                round_trip += measure_round_trip(tokenizer, sample)
                for split, writer in writers.items():
                    ours = [i for i, document in enumerate(batch) if document[2] == split]
                    if ours:
                        writer.add([batch[i][1] for i in ours], [ids[i] for i in ours])
            counts: dict[str, Any] = {s: w.close()._asdict() for s, w in writers.items()}
        with error_context(self.domain):
            counts |= {"broken": broken.messages, "round_trip": round_trip._asdict()}
            self.build.write_json(self.output, counts)

    def _documents(self, broken: BadRecords) -> Iterator[Document]:
        documents = (d for d in self.part.documents(broken) if d.text)
        if not self.deduplicated:
            return documents
        return _without(documents, self.build.fetch(drop_name(self.number)))

    def _writer(self, split: str, tokenizer: Tokenizer, files: contextlib.ExitStack) -> TokenWriter:
        names = token_name(split, self.number), index_name(split, self.number)
        paths = [files.enter_context(self.build.writing(name)) for name in names]
        tokens, index = (files.enter_context(path.open("wb")) for path in paths)
        return TokenWriter(tokens, index, token_dtype(tokenizer.vocab_size), tokenizer.eod)


@dataclasses.dataclass(frozen=True)
class ComputeSignatures(Task):
    """A task that writes the signatures of one part's documents; see `data/prepare/dedup.py`.

    Attributes:
      near: True to find near copies too.
    """

    near: bool

    @property
    def output(self) -> str:
        """Returns the file that is written last."""
        return signatures_name(self.number)

    def run(self) -> None:
        """Writes the output."""
        with error_context(self.domain):
            documents = (d for d in self.part.documents(BadRecords(self.allowed)) if d.text)
            pairs = ((split, text) for text, _, split in _with_splits(documents))
            computed = compute_signatures(pairs, self.near)
            with self.build.writing(self.output) as path:
                computed.save(path)


def pending(tasks: Sequence[Task]) -> list[Task]:
    """Returns the tasks whose output does not exist."""
    names = {build: set(build.names()) for build in {task.build for task in tasks}}
    return [task for task in tasks if task.output not in names[task.build]]


def signatures_name(number: int) -> str:
    """Returns the name of the file of a part's signatures."""
    return f"{number:05d}.signatures"


def drop_name(number: int) -> str:
    """Returns the name of the file with the mask of a part's duplicates."""
    return f"{number:05d}.drop.npy"


def _error_name(number: int) -> str:
    return f"{number:05d}.error.json"


@contextlib.contextmanager
def error_context(domain: str) -> Iterator[None]:
    """Adds the domain to errors, and turns a full disk into a DemixError."""
    try:
        yield
    except DemixError as error:
        raise DemixError(f"domain {domain!r}: {error}") from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DemixError(
            f"domain {domain!r}: {os.strerror(error.errno)} while writing token files; what is "
            "finished stays: make room, then repeat the same command"
        ) from None


def _without(documents: Iterable[Document], mask: Path) -> Iterator[Document]:
    """Yields the documents that the mask does not drop; raises DemixError if it does not fit."""
    drop = read_array(mask, "delete its folder and run `demix prepare` again")
    for document, dropped in itertools.zip_longest(documents, drop):
        if document is None or dropped is None:
            raise DemixError("its text changed while it was prepared; run `demix prepare` again")
        if not dropped:
            yield document


def _with_splits(documents: Iterable[Document]) -> Iterator[tuple[str, bytes, str]]:
    """Yields each text, its UTF-8, and its split."""
    for text, _, split in documents:
        yield text, text.encode(), split or hash_split(text)


def _batches(
    documents: Iterator[tuple[str, bytes, str]],
) -> Iterator[list[tuple[str, bytes, str]]]:
    """Yields documents to tokenize at once: some hundreds, and no more than a few MB."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document[1])
        if len(batch) == _BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@functools.lru_cache(maxsize=1)
def _load_tokenizer(folder: Path, digest: str | None) -> Tokenizer:
    """Loads a tokenizer once in a process, and again if another is in the folder by then."""
    del digest  # part of the cache's key
    return load_tokenizer(folder)
