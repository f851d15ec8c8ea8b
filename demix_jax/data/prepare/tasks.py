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

import numpy as np

from demix_jax.data.prepare.dedup import signatures
from demix_jax.data.prepare.storage import Store
from demix_jax.data.sources.base import SPLITS, BadRecords, Document, Part, hash_split
from demix_jax.data.token_files import TokenWriter, counts_name, index_name, token_dtype, token_name
from demix_jax.data.tokenizers import Tokenizer, load_tokenizer, read_meta
from demix_jax.errors import DemixError

_BATCH = 256  # documents tokenized at once, at most
_BATCH_BYTES = 1 << 20  # of text in them, unless one alone is longer


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """What is to be made of one part.

    Attributes:
      domain: whose text it is.
      number: of the part.
      part: the text.
      build: where the output goes.
      allowed: broken records to skip.
    """

    domain: str
    number: int
    part: Part
    build: Store
    allowed: int

    @property
    def size(self) -> int:
        """About how many bytes there are to read."""
        return self.part.size

    @property
    @abc.abstractmethod
    def output(self) -> str:
        """The file that is written last, so that it says that the task is done."""

    @abc.abstractmethod
    def run(self) -> None:
        """Does it; raises DemixError for what is wrong with the text or the disk."""

    @property
    def is_done(self) -> bool:
        """Whether its output is there."""
        return self.build.exists(self.output)

    def fail(self, error: DemixError) -> None:
        """Leaves word of what went wrong, for whoever started the task elsewhere."""
        self.build.write_json(_error_name(self.number), {"error": str(error)})

    def failure(self) -> str | None:
        """What `fail` was told."""
        return self.build.read_json(_error_name(self.number)).get("error")


@dataclasses.dataclass(frozen=True)
class Tokenize(Task):
    """Writes the token files of one part.

    Attributes:
      root: the prepared data, which has the tokenizer.
      deduplicated: whether `drop_name` says which documents to leave out.
    """

    root: Store
    deduplicated: bool = False

    @property
    def output(self) -> str:
        """See Task."""
        return counts_name(self.number)

    def run(self) -> None:
        """See Task."""
        broken = BadRecords(self.allowed)
        with error_context(self.domain), contextlib.ExitStack() as files:
            tokenizer = _tokenizer(self.root.fetch("tokenizer"))
            documents = _with_splits(self._documents(broken))
            writers = {split: self._writer(split, tokenizer, files) for split in SPLITS}
            for batch in _batches(documents):
                ids = tokenizer.encode_batch([text for text, _, _ in batch])
                for split, writer in writers.items():
                    mine = [i for i, row in enumerate(batch) if row[2] == split]
                    if mine:
                        writer.add([batch[i][1] for i in mine], [ids[i] for i in mine])
            counts: dict[str, Any] = {s: w.close()._asdict() for s, w in writers.items()}
        with error_context(self.domain):
            self.build.write_json(self.output, counts | {"broken": broken.places})

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
    """Writes what duplicates of one part's documents are found by; see `data/prepare/dedup.py`.

    Attributes:
      near: whether those that are only alike are to be found too.
    """

    near: bool

    @property
    def output(self) -> str:
        """See Task."""
        return sign_name(self.number)

    def run(self) -> None:
        """See Task."""
        with error_context(self.domain):
            documents = (d for d in self.part.documents(BadRecords(self.allowed)) if d.text)
            pairs = ((split, text) for text, _, split in _with_splits(documents))
            found = signatures(pairs, self.near)
            with self.build.writing(self.output) as path:
                found.save(path)


def pending(tasks: Sequence[Task]) -> list[Task]:
    """Those whose output is not there."""
    names = {build: set(build.names()) for build in {task.build for task in tasks}}
    return [task for task in tasks if task.output not in names[task.build]]


def sign_name(number: int) -> str:
    """The file of a part's signatures."""
    return f"{number:05d}.signatures"


def drop_name(number: int) -> str:
    """The file that says which documents of a part are duplicates."""
    return f"{number:05d}.drop.npy"


def _error_name(number: int) -> str:
    return f"{number:05d}.error.json"


@contextlib.contextmanager
def error_context(domain: str) -> Iterator[None]:
    """Errors name the domain; a full disk is said in words."""
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
    """Documents but those that the mask drops; raises DemixError if it is not a mask of them."""
    try:
        drop = np.load(mask)
    except (OSError, ValueError, EOFError) as error:
        raise DemixError(
            f"{mask} is damaged ({error}); delete its folder and run `demix prepare` again"
        ) from None
    for document, dropped in itertools.zip_longest(documents, drop):
        if document is None or dropped is None:
            raise DemixError("its text changed while it was prepared; run `demix prepare` again")
        if not dropped:
            yield document


def _with_splits(documents: Iterable[Document]) -> Iterator[tuple[str, bytes, str]]:
    """Text, its UTF-8, and its split."""
    for text, _, split in documents:
        yield text, text.encode(), split or hash_split(text)


def _batches(
    documents: Iterator[tuple[str, bytes, str]],
) -> Iterator[list[tuple[str, bytes, str]]]:
    """Documents to tokenize at once: some hundreds, and no more than fit into little memory."""
    batch, size = [], 0
    for row in documents:
        batch.append(row)
        size += len(row[1])
        if len(batch) == _BATCH or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenizer(folder: Path) -> Tokenizer:
    return _cached_tokenizer(folder, read_meta(folder).get("hash"))


@functools.lru_cache(maxsize=1)
def _cached_tokenizer(folder: Path, digest: str | None) -> Tokenizer:
    del digest  # the folder may have become another one's
    return load_tokenizer(folder)
