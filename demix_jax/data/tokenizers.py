"""Tokenizers: bytes, SentencePiece, or a Hugging Face `tokenizer.json`; without TensorFlow.

Every tokenizer has one end-of-document token, which starts and separates documents. Tokenizers
are saved in a folder (`tokenizer/` of the prepared data and of each run) with a hash.
"""

import abc
import contextlib
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np

from demix_jax.data.sources.base import decode_text, one_line
from demix_jax.errors import DemixError
from demix_jax.files import resolve_path, whole_folder, write_json
from demix_jax.typed_files import read_bytes, read_json, reading, seal

_META = "tokenizer_meta.json"
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
_CHANCE = ("dropout", "alpha", "nbest_size")  # settings of models that choose tokens at random
_ROUND_TRIP = 100_000  # characters of one text, at most
_MOST_DEFINITION = 1 << 28  # bytes of a tokenizer's file
_MOST_TOKENS = 1 << 24


class Tokenizer(abc.ABC):
    """The base class of tokenizers; subclasses define `_encode` and `_decode`.

    Text never has the end-of-document id, whatever it spells: where the vocabulary's own end token
    can come out of text, documents end with one id more.

    Attributes:
      vocab_size: number of ids, the end-of-document id included.
      eod: end-of-document id.
      hash: hex digest of the definition; equal hashes tokenize equally.
    """

    kind: str
    vocab_size: int
    eod: int

    def __init__(self, name: str, definition: bytes):
        self._name = name
        self.hash = hashlib.sha256(self.kind.encode() + b"\0" + definition).hexdigest()[:16]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns token ids (int32) of each text, without end-of-document tokens.

        Raises:
          DemixError: a text that the tokenizer cannot encode, such as unknown characters where it
            has no token for them.
        """
        try:
            with self._own_errors("encode this text"):
                return self._encode(texts)
        except DemixError:
            for text in texts:  # to name the one
                with self._own_errors(f"encode the text that begins {text[:40]!r}"):
                    self._encode([text])
            raise

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; end-of-document tokens are left out."""
        with self._own_errors("decode its own tokens"):
            return self._decode([int(i) for i in ids if i != self.eod])

    @abc.abstractmethod
    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]: ...

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @contextlib.contextmanager
    def _own_errors(self, what: str) -> Iterator[None]:
        """Turns any error of the tokenizer's library into a DemixError of one line."""
        try:
            yield
        except BaseException as error:
            if not _of_library(error):
                raise
            raise DemixError(
                f"the tokenizer {self._name} cannot {what}: {one_line(error)}; use one that has a "
                "token for unknown characters or falls back to bytes, or data.tokenizer=bytes"
            ) from error


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, and id 256 for end of document."""

    kind = "bytes"
    vocab_size = 257
    eod = 256

    def __init__(self) -> None:
        super().__init__("bytes", b"")

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; its end-of-sentence piece, or one id more, ends documents."""

    kind = "sentencepiece"

    def __init__(self, path: Path):
        import sentencepiece

        definition = _read_definition(path)
        super().__init__(str(path), definition)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=definition)
        except Exception as error:  # also of messages that are no UTF-8
            raise DemixError(f"{path} is not a SentencePiece model; give a .model file") from error
        pieces = self._model.get_piece_size()
        if not pieces:
            raise DemixError(f"{path} is not a SentencePiece model; give a .model file")
        end = self._model.eos_id()
        has_end = end >= 0 and self._model.is_control(end)  # then text cannot spell it
        self.eod = end if has_end else pieces
        self.vocab_size = pieces + (not has_end)

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        # One thread, for parts are what runs in parallel.
        return self._model.encode(list(texts), num_threads=1, return_type="numpy")

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def score(self, ids: Sequence[int]) -> float:
        """Returns the sum of the scores of pieces, which encoding maximises."""
        return sum(map(self._model.get_score, ids))


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; its end-of-text token, or one id more, ends documents.

    Args:
      path: path of the file.
      document_token: token of its vocabulary that ends documents instead; "" means none.
    """

    kind = "huggingface"

    def __init__(self, path: Path, document_token: str = ""):
        import tokenizers

        definition = _read_definition(path)
        named = b"\0" + document_token.encode() if document_token else b""
        super().__init__(str(path), definition + named)
        try:
            text = decode_text(definition)
            self._model = tokenizers.Tokenizer.from_str(text)
            model = json.loads(text)["model"]
        except BaseException as error:
            if not _of_library(error):
                raise
            raise DemixError(
                f"{path} is not a Hugging Face tokenizer.json: {one_line(error)}"
            ) from error
        for key in _CHANCE:
            if model.get(key):
                raise DemixError(
                    f"{path} tokenizes at random (model.{key} is {model[key]}), the same text into "
                    "other tokens each time; set it to null in a copy of the file"
                )
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # text that spells one is text
        size = max(self._model.get_vocab().values(), default=-1) + 1
        names = (document_token,) if document_token else _END_NAMES
        end = next((name for name in names if self._never_in_text(name, model)), None)
        if document_token and end is None:
            raise DemixError(
                f"{document_token!r} cannot separate documents: it is no token of {path}, or text "
                "can spell it; choose a special token of the file"
            )
        number = None if end is None else self._model.token_to_id(end)
        self.eod = size if number is None else number
        self.vocab_size = max(size, self.eod + 1)
        if self.vocab_size > _MOST_TOKENS:
            raise DemixError(
                f"{path} has an id of {self.vocab_size - 1:,}; at most {_MOST_TOKENS:,} tokens are "
                "read, for a model has a row for each id"
            )

    def _never_in_text(self, name: str, model: dict[str, Any]) -> bool:
        """Returns True for a token of the vocabulary that no text is encoded to.

        Text is searched for added tokens that are not special. A unigram model finds a piece where
        that is the best way to cut its text, BPE those that it merges, any other model all pieces.
        """
        number = self._model.token_to_id(name)
        if number is None or name == model.get("unk_token") or number == model.get("unk_id"):
            return False
        added = self._model.get_added_tokens_decoder().get(number)
        if added is not None and not added.special:
            return False
        vocabulary = model["vocab"]
        if not isinstance(vocabulary, dict):  # unigram
            texts = (name, f"a{name}b")
            found = (self._model.encode(text, add_special_tokens=False).ids for text in texts)
            return all(number not in ids for ids in found)
        if "merges" not in model or model.get("ignore_merges"):
            return name not in vocabulary
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        prefix = model.get("continuing_subword_prefix") or ""
        merged = (first + second.removeprefix(prefix) for first, second in pairs)
        return len(name) > 1 and all(piece != name for piece in merged)

    def _encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, np.int32) for e in encoded]

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)


def _of_library(error: BaseException) -> bool:
    """Returns True for errors, also for what panics in Rust, which is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _read_definition(path: Path) -> bytes:
    with reading(path, "give a .model file of SentencePiece or a tokenizer.json"):
        return read_bytes(path, _MOST_DEFINITION)


class RoundTrip(NamedTuple):
    """The part of a sample of texts that comes back when their tokens are decoded.

    Attributes:
      documents: number of texts.
      unchanged: number of those that come back as they were.
      characters: number of characters in the texts.
      returned: number of those that come back, whatever their order.
    """

    documents: int = 0
    unchanged: int = 0
    characters: int = 0
    returned: int = 0

    def __add__(self, other: "RoundTrip") -> "RoundTrip":  # type: ignore[override]
        return RoundTrip(*(one + two for one, two in zip(self, other, strict=True)))

    @property
    def share(self) -> float:
        """Returns the share of the characters that come back; 1 only if nothing was changed."""
        if self.unchanged == self.documents:
            return 1.0
        return min(self.returned / max(1, self.characters), 0.9999)


def measure_round_trip(tokenizer: Tokenizer, texts: Iterable[str]) -> RoundTrip:
    """Encodes and decodes the beginnings of texts, and counts what comes back."""
    total = RoundTrip()
    for text in (text[:_ROUND_TRIP] for text in texts):
        (ids,) = tokenizer.encode_batch([text])
        again = tokenizer.decode(ids.tolist())
        same = again == text
        returned = len(text) if same else (Counter(text) & Counter(again)).total()
        total += RoundTrip(1, same, len(text), returned)
    return total


def open_tokenizer(source: str | Path) -> Tokenizer:
    """Opens the tokenizer "bytes", a .model or .json file, or the one saved in a folder.

    Raises DemixError for anything else.
    """
    if str(source) == "bytes":
        return ByteTokenizer()
    path = Path(resolve_path(source))
    if folder := _saved_in(path):
        return load_tokenizer(folder)
    makers: dict[str, type[Any]] = {".model": SentencePieceTokenizer, ".json": HuggingFaceTokenizer}
    if path.suffix not in makers:
        raise DemixError(
            f"unknown tokenizer {str(source)!r}; use sentencepiece, bytes, a SentencePiece "
            "FILE.model or a Hugging Face tokenizer.json, or name the folder of a run"
        )
    if not path.is_file():
        raise DemixError(f"tokenizer file {path} does not exist")
    return makers[path.suffix](path)


def _saved_in(path: Path) -> Path | None:
    """Returns the folder of the tokenizer that a run, prepared data or a folder itself has."""
    places = (path, path / "tokenizer")
    return next((place for place in places if (place / _META).is_file()), None)


def save_tokenizer(
    source: str | Path,
    folder: Path,
    asked: dict[str, Any],
    document_token: str = "",
    trained_on: Sequence[str] | None = None,
) -> Tokenizer:
    """Copies a tokenizer into `folder`, created whole or not at all, with `asked` as a note.

    Args:
      source: tokenizer, as `open_tokenizer` takes it.
      folder: folder to create.
      asked: note that is kept with it.
      document_token: token of a tokenizer.json that ends documents; "" means the usual one.
      trained_on: domains whose text it was trained on; None means that of a copy is kept.
    """
    path = None if str(source) == "bytes" else Path(resolve_path(source))
    if path and (saved := _saved_in(path)):
        meta = read_meta(saved)
        document_token = meta.get("document_token", "")
        trained_on = meta.get("trained_on")
        path = saved / meta["file"] if meta["file"] else None
    tokenizer = open_tokenizer(path or "bytes")
    if document_token:
        assert path is not None
        tokenizer = HuggingFaceTokenizer(path, document_token)
    file = "tokenizer" + path.suffix if path else None
    meta = {"kind": tokenizer.kind, "file": file, "hash": tokenizer.hash, "asked": asked}
    if document_token:
        meta["document_token"] = document_token
    if trained_on is not None or path is None:  # bytes are no one's text
        meta["trained_on"] = list(trained_on or ())
    with whole_folder(folder) as partial:
        if path and file:
            shutil.copyfile(path, partial / file)
        write_json(partial / _META, seal(meta))
    return tokenizer


class _Meta(TypedDict):
    """The note that `save_tokenizer` writes."""

    kind: str
    file: str | None
    hash: str
    asked: dict[str, Any]
    document_token: NotRequired[str]
    trained_on: NotRequired[list[str]]


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads the note written by `save_tokenizer`; {} if there is none."""
    path = folder / _META
    way_out = f"copy {folder.name}/ from a run, or prepared data, of the same tokenizer"
    return dict(read_json(path, _Meta, way_out)) if path.exists() else {}


def load_tokenizer(folder: Path) -> Tokenizer:
    """Opens the tokenizer saved in `folder`; raises DemixError if it is missing or altered."""
    meta = read_meta(folder)
    if not meta:
        raise DemixError(f"no tokenizer in {folder}; run `demix prepare` first")
    if meta["file"] not in (None, "tokenizer.json", "tokenizer.model"):
        raise DemixError(f"{folder / _META} names a file {meta['file']!r}, which is not beside it")
    if document_token := meta.get("document_token"):
        tokenizer: Tokenizer = HuggingFaceTokenizer(folder / meta["file"], document_token)
    else:
        tokenizer = open_tokenizer(folder / meta["file"] if meta["file"] else "bytes")
    if tokenizer.hash != meta["hash"]:
        raise DemixError(
            f"the tokenizer in {folder} was altered: hash {tokenizer.hash}, expected {meta['hash']}"
        )
    return tokenizer
