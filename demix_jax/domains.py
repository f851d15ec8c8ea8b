"""Where a domain's text comes from; every source is read as a SeqIO task.

A source is the word "embedded" (see `corpus.py`) or a folder that holds, for each domain, either a
file `<domain>.jsonl[.gz|.zst]` (fields `text`, optional `id`, optional `split`) or a folder
`<domain>/` of plain text files (optionally below `train/`, `valid/` and `test/`).
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from demix_jax import corpus
from demix_jax.config import DataConfig, check_names
from demix_jax.documents import Document
from demix_jax.errors import DemixError, suggest

SPLITS = ("train", "valid", "test")
_SPLIT_NAMES = {name: name for name in SPLITS} | {
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
}
_JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")


@dataclasses.dataclass(frozen=True)
class Source:
    """The text of one domain.

    Attributes:
      documents: called with the number of bad lines to skip; yields every document, in order.
      fingerprint: called to learn a digest that changes when the documents do.
      novel: whether the source itself declares the domain novel.
    """

    documents: Callable[[int], Iterator[Document]]
    fingerprint: Callable[[], str]
    novel: bool = False


@dataclasses.dataclass(frozen=True)
class Domains:
    """All domains of a configuration: their sources, and which are trained on."""

    sources: dict[str, Source]
    train: tuple[str, ...]
    novel: tuple[str, ...]


def find_domains(config: DataConfig) -> Domains:
    """Looks into every source of `config`; reads no text.

    Raises:
      DemixError: a folder is missing or empty, a name repeats, or a named domain does not exist.
    """
    sources: dict[str, Source] = {}
    for place in config.sources:
        for name, source in _list_source(place, Path(config.dir)):
            if name in sources:
                raise DemixError(f"domain {name!r} is found twice in {', '.join(config.sources)}")
            sources[name] = source
    check_names(tuple(sources))
    for name in config.train_domains + config.novel_domains:
        if name not in sources:
            raise DemixError(
                f"unknown domain {name!r}{suggest(name, sources)} (domains: {', '.join(sources)})"
            )
    declared = tuple(n for n, s in sources.items() if s.novel)
    novel = config.novel_domains or tuple(n for n in declared if n not in config.train_domains)
    train = config.train_domains or tuple(n for n in sources if n not in novel + declared)
    return Domains({name: sources[name] for name in train + novel}, train, novel)


def read_task(name: str, source: Source, split: str, skip_bad_lines: int) -> Iterator[Document]:
    """The documents of one split, read through a SeqIO task (imports TensorFlow).

    Raises:
      DemixError: whatever the source found wrong with its text.
    """
    seqio, tf = _import_seqio()
    failure: list[Exception] = []

    def examples() -> Iterator[dict[str, str]]:
        try:
            for document in source.documents(skip_bad_lines):
                if split == (document.split or hash_split(document.text)):
                    yield {"text": document.text, "id": document.id}
        except Exception as error:  # tf.data would bury it in a traceback of its own
            failure.append(error)

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> Any:
        del split, shuffle_files, seed  # order is the source's
        spec = {key: tf.TensorSpec((), tf.string) for key in ("text", "id")}
        return tf.data.Dataset.from_generator(examples, output_signature=spec)

    text = seqio.Feature(seqio.PassThroughVocabulary(0), add_eos=False, rank=0, dtype=tf.string)
    task = seqio.Task(
        "demix_" + name.replace("-", "_"),
        source=seqio.FunctionDataSource(dataset, splits=[split]),
        output_features={"text": text},
        preprocessors=[],
    )
    for row in task.get_dataset(split=split, shuffle=False).as_numpy_iterator():
        yield Document(row["text"].decode(), row["id"].decode(), split)
    if failure:
        raise failure[0]


def hash_split(text: str) -> str:
    """90/5/5 by the SHA-256 of the text, so a document never changes its split."""
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32
    return "train" if share < 0.9 else "valid" if share < 0.95 else "test"


def _list_source(place: str, prepared: Path) -> Iterator[tuple[str, Source]]:
    if place == "embedded":
        for name in corpus.TRAIN_DOMAINS + corpus.NOVEL_DOMAINS:
            yield name, _embedded(name)
        return
    folder = Path(place)
    if not folder.is_dir():
        raise DemixError(f"data source {place!r} is neither 'embedded' nor a folder")
    found = 0
    for path in sorted(folder.iterdir()):
        ending = next((e for e in _JSONL_ENDINGS if path.name.endswith(e)), None)
        if path.name.startswith(".") or not (path.is_dir() or ending):
            continue
        if path.resolve() == prepared.resolve():  # our own output is no domain
            continue
        found += 1
        if path.is_dir():
            yield path.name, _text_folder(path)
        else:
            yield path.name.removesuffix(ending or ""), _jsonl_file(path)
    if not found:
        raise DemixError(
            f"data source {place!r} holds no <domain>.jsonl[.gz|.zst] and no <domain>/ folder"
        )


def _embedded(name: str) -> Source:
    @functools.cache  # one extraction for the three splits; a few megabytes
    def documents() -> tuple[Document, ...]:
        return tuple(corpus.read_domain(name))

    return Source(
        documents=lambda skip: iter(documents()),
        fingerprint=lambda: corpus.fingerprint(name),
        novel=name in corpus.NOVEL_DOMAINS,
    )


def _jsonl_file(path: Path) -> Source:
    return Source(
        documents=lambda skip: read_jsonl(path, skip),
        fingerprint=lambda: _hash_files(path.parent, [path]),
    )


def _text_folder(folder: Path) -> Source:
    return Source(
        documents=lambda skip: _read_texts(folder),
        fingerprint=lambda: _hash_files(folder, _text_files(folder)),
    )


def read_jsonl(path: Path, skip: int) -> Iterator[Document]:
    """The documents of a file of JSON lines, of which `skip` may be broken.

    Raises:
      DemixError: one broken line more, with its file and line.
    """
    bad = 0
    with _open_compressed(path) as lines:
        for number, line in enumerate(_lines(path, lines), start=1):
            if not line.strip():
                continue
            try:
                yield _parse_line(line, f"{path.name}:{number}")
            except DemixError as error:
                bad += 1
                if bad > skip:
                    allowed = f" ({skip} bad lines were allowed)" if skip else ""
                    raise DemixError(f"{path}:{number}: {error}{allowed}") from None


def _parse_line(line: bytes, place: str) -> Document:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DemixError(f"invalid UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise DemixError(f"broken JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise DemixError(f"JSON that cannot be read: {error}") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DemixError("expected an object with a string field 'text'")
    split = row.get("split")
    if split is not None and not (isinstance(split, str) and split in _SPLIT_NAMES):
        raise DemixError(f"unknown split {split!r}; use {', '.join(_SPLIT_NAMES)}")
    document = Document(row["text"], str(row.get("id", place)), split and _SPLIT_NAMES[split])
    for field in ("text", "id"):
        try:
            getattr(document, field).encode()
        except UnicodeEncodeError:
            raise DemixError(f"field {field!r} has a lone surrogate, which is no UTF-8") from None
    return document


def _lines(path: Path, lines: BinaryIO) -> Iterator[bytes]:
    """The lines of a stream; a damaged archive is the user's error, not a traceback."""
    try:
        yield from lines
    except (EOFError, OSError, zlib.error) as error:
        raise DemixError(f"{path}: cannot be decompressed ({error})") from None
    except Exception as error:
        if type(error).__name__ != "ZstdError":
            raise
        raise DemixError(f"{path}: cannot be decompressed ({error})") from None


def _open_compressed(path: Path) -> BinaryIO:
    if path.suffix == ".gz":
        return gzip.open(path)  # type: ignore[return-value]
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstdFile(path))
    return path.open("rb")


class _ZstdFile(io.RawIOBase):
    """All frames of a zstd file; unlike the library's reader, refuses one that ends too early."""

    def __init__(self, path: Path):
        import zstandard

        self._new = zstandard.ZstdDecompressor().decompressobj
        self._file, self._frame = path.open("rb"), self._new()
        self._pending, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            self._pending = self._pending or self._file.read(1 << 16)
            if not self._pending:
                if not self._frame.eof:
                    raise EOFError("the file ends inside a frame")
                return 0
            if self._frame.eof:
                self._frame = self._new()
            self._ready = memoryview(self._frame.decompress(self._pending))
            self._pending = self._frame.unused_data if self._frame.eof else b""
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _text_files(folder: Path) -> list[Path]:
    files = (f for f in folder.rglob("*") if f.is_file())
    return sorted(
        f for f in files if not any(p.startswith(".") for p in f.relative_to(folder).parts)
    )


def _read_texts(folder: Path) -> Iterator[Document]:
    for path in _text_files(folder):
        relative = path.relative_to(folder)
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise DemixError(f"{path}: invalid UTF-8 at byte {error.start}") from None
        split = _SPLIT_NAMES.get(relative.parts[0]) if len(relative.parts) > 1 else None
        yield Document(text, relative.as_posix(), split)


def _hash_files(folder: Path, paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        name = path.relative_to(folder).as_posix()
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def _import_seqio() -> tuple[Any, Any]:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with _quiet_stderr():
            import seqio
            import tensorflow as tf
    except ImportError as error:
        raise DemixError(
            f"preparing data needs SeqIO and TensorFlow ({error}); "
            "install them with: pip install 'demix_jax[data]'"
        ) from error
    return seqio, tf


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drops what TensorFlow's libraries print while they load; exceptions still come through."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "w") as sink:
        os.dup2(sink.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
