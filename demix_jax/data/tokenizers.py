"""Tokenizers: bytes, SentencePiece, or a Hugging Face `tokenizer.json`; without TensorFlow.

Every tokenizer has one end-of-document token, which starts and separates documents. Tokenizers
are saved in a folder (`tokenizer/` of the prepared data and of each run) with a hash.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from demix_jax.errors import DemixError
from demix_jax.files import PARTIAL, resolve_path, write_json

_META = "tokenizer_meta.json"
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")


class Tokenizer:
    """The base class of tokenizers; subclasses define `encode_batch` and `decode`.

    Attributes:
      vocab_size: number of ids, the end-of-document id included.
      eod: end-of-document id.
      hash: hex digest of the definition; equal hashes tokenize equally.
    """

    kind: str
    vocab_size: int
    eod: int

    def __init__(self, definition: bytes):
        self.hash = hashlib.sha256(self.kind.encode() + b"\0" + definition).hexdigest()[:16]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns token ids (int32) of each text, without end-of-document tokens."""
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; end-of-document tokens are left out."""
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes, and id 256 for end of document."""

    kind = "bytes"
    vocab_size = 257
    eod = 256

    def __init__(self) -> None:
        super().__init__(b"")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns token ids (int32) of each text."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`."""
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model; its end-of-sentence piece, or one id more, ends documents."""

    kind = "sentencepiece"

    def __init__(self, path: Path):
        import sentencepiece

        definition = path.read_bytes()
        super().__init__(definition)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=definition)
        except RuntimeError as error:
            raise DemixError(f"{path} is not a SentencePiece model; give a .model file") from error
        pieces = self._model.get_piece_size()
        if not pieces:
            raise DemixError(f"{path} is not a SentencePiece model; give a .model file")
        has_end = self._model.eos_id() >= 0
        self.eod = self._model.eos_id() if has_end else pieces
        self.vocab_size = pieces + (not has_end)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns token ids (int32) of each text."""
        # One thread, for parts are what runs in parallel.
        return self._model.encode(list(texts), num_threads=1, return_type="numpy")

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`."""
        return self._model.decode([int(i) for i in ids if i != self.eod])


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`; its end-of-text token, or one id more, ends documents."""

    kind = "huggingface"

    def __init__(self, path: Path):
        import tokenizers

        super().__init__(path.read_bytes())
        try:
            self._model = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise DemixError(f"{path} is not a Hugging Face tokenizer.json: {error}") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # text that spells one is text
        size = max(self._model.get_vocab().values(), default=-1) + 1
        ids = (self._model.token_to_id(name) for name in _END_NAMES)
        self.eod = next((i for i in ids if i is not None), size)
        self.vocab_size = max(size, self.eod + 1)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns token ids (int32) of each text."""
        encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, np.int32) for e in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`."""
        return self._model.decode([int(i) for i in ids if i != self.eod])


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains a unigram model on `texts`; raises DemixError if they are too small for `vocab_size`.

    It is lossless: no normalisation, unknown characters as bytes, whitespace kept (code needs it).
    The one exception is U+2581, by which SentencePiece itself means a space.
    """
    import sentencepiece

    model = io.BytesIO()
    failure: list[DemixError] = []

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                yield from text.splitlines(keepends=True)
        except DemixError as error:  # the trainer would turn it into an error of its own
            failure.append(error)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(),
            model_writer=model,
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n"],
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=16_384,
            num_sub_iterations=1,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except (RuntimeError, DemixError) as error:
        if failure:
            raise failure[0] from None
        reason = str(error).splitlines()[0]
        raise DemixError(
            f"cannot train a sentencepiece model of data.vocab_size {vocab_size}: {reason}; "
            "lower data.vocab_size, add text, or use data.tokenizer=bytes"
        ) from error
    path.write_bytes(model.getvalue())


def open_tokenizer(source: str | Path) -> Tokenizer:
    """Opens the tokenizer "bytes", or a .model or .json file; raises DemixError for another."""
    if str(source) == "bytes":
        return ByteTokenizer()
    path = Path(resolve_path(source))
    makers: dict[str, type[Any]] = {".model": SentencePieceTokenizer, ".json": HuggingFaceTokenizer}
    if path.suffix not in makers:
        raise DemixError(
            f"unknown tokenizer {str(source)!r}; use sentencepiece, bytes, a SentencePiece "
            "FILE.model or a Hugging Face tokenizer.json"
        )
    if not path.is_file():
        raise DemixError(f"tokenizer file {path} does not exist")
    return makers[path.suffix](path)


def save_tokenizer(source: str | Path, folder: Path, asked: dict[str, Any]) -> Tokenizer:
    """Copies a tokenizer into `folder`, created whole or not at all, with `asked` as a note."""
    tokenizer = open_tokenizer(source)
    staging = folder.with_name(folder.name + PARTIAL)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    file = None
    if tokenizer.kind != "bytes":
        path = Path(resolve_path(source))
        file = "tokenizer" + path.suffix
        shutil.copyfile(path, staging / file)
    meta = {"kind": tokenizer.kind, "file": file, "hash": tokenizer.hash, "asked": asked}
    write_json(staging / _META, meta)
    staging.rename(folder)
    return tokenizer


def read_meta(folder: Path) -> dict[str, Any]:
    """Reads the note written by `save_tokenizer`; {} if there is none."""
    path = folder / _META
    return json.loads(path.read_text()) if path.exists() else {}


def load_tokenizer(folder: Path) -> Tokenizer:
    """Opens the tokenizer saved in `folder`; raises DemixError if it is missing or altered."""
    meta = read_meta(folder)
    if not meta:
        raise DemixError(f"no tokenizer in {folder}; run `demix prepare` first")
    tokenizer = open_tokenizer(folder / meta["file"] if meta["file"] else "bytes")
    if tokenizer.hash != meta["hash"]:
        raise DemixError(
            f"the tokenizer in {folder} was altered: hash {tokenizer.hash}, expected {meta['hash']}"
        )
    return tokenizer
