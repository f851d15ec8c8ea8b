"""The tokenizer that `demix prepare` trains on text of the training domains, if none is given."""

import io
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from demix_jax.config.schema import MIN_VOCAB_SIZE, Config, check_trunk_domains
from demix_jax.data.prepare.tasks import error_context
from demix_jax.data.sources.base import BadRecords, hash_split
from demix_jax.data.sources.resolve import Domains
from demix_jax.errors import DemixError

_SAMPLE_BYTES = 500_000  # of text of each domain

_MAX_LINE = 16_384  # bytes that SentencePiece takes in one line; it drops longer ones
_MARK = "\u2585"  # by which it means an unknown character; it drops lines that have one
_WORDS = 64  # in a piece of a line that is cut, on average


def tokenizer_domains(config: Config, domains: Domains) -> Sequence[str]:
    """Returns the domains to train a tokenizer on: those of a clean trunk, or all training ones."""
    check_trunk_domains(config.train, domains.train)
    return config.train.trunk_domains or domains.train


def sample_text(config: Config, domains: Domains) -> Iterator[str]:
    """Yields text to train a tokenizer on: equally much of each of its domains."""
    for name in tokenizer_domains(config, domains):
        size, broken = 0, BadRecords(config.data.skip_bad_lines)
        with error_context(name):
            for document in (d for p in domains.sources[name].parts() for d in p.documents(broken)):
                if (document.split or hash_split(document.text)) != "train":
                    continue
                yield document.text[:_SAMPLE_BYTES]
                size += len(document.text.encode())
                if size >= _SAMPLE_BYTES:
                    break


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Trains a unigram model on `texts`; raises DemixError if they do not fit `vocab_size`.

    It is lossless: no normalisation, unknown characters as bytes, whitespace kept (code needs it).
    The one exception is U+2581, by which SentencePiece itself means a space.
    """
    import sentencepiece

    model = io.BytesIO()
    failure: list[DemixError] = []

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                for line in text.splitlines(keepends=True):
                    yield from _cut_line(line)
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
            max_sentence_length=_MAX_LINE,
            num_sub_iterations=1,
            num_threads=os.cpu_count() or 1,
            minloglevel=2,
        )
    except (RuntimeError, DemixError) as error:
        if failure:
            raise failure[0] from None
        raise DemixError(
            f"a sentencepiece model of data.vocab_size={vocab_size} cannot be trained: "
            f"{_sentencepiece_reason(str(error))}, or use data.tokenizer=bytes"
        ) from error
    path.write_bytes(model.getvalue())


def _cut_line(line: str) -> Iterable[str]:
    """Cuts a line where SentencePiece would drop it: if it is too long, or at its own mark.

    It is very slow on long text that repeats itself, so a piece of a long line comes once, and cuts
    follow the words: what repeats itself is cut into the same pieces.
    """
    size = _MAX_LINE // 4  # characters have up to 4 bytes
    if len(line) <= size:
        return line.split(_MARK)
    cut: dict[str, None] = {}
    for part in line.split(_MARK):
        piece = ""
        for word in re.findall(rf"\S{{1,{size - 1}}}\s?|\s", part):
            if len(piece) + len(word) > size:
                cut[piece], piece = None, ""
            piece += word
            if zlib.crc32(word.encode()) % _WORDS == 0:
                cut[piece], piece = None, ""
        cut[piece] = None
    return cut


def _sentencepiece_reason(message: str) -> str:
    """Returns the reason of a failed training, and our way out instead of SentencePiece's flags."""
    if found := re.search(r"set it to a value <= (\d+)", message):
        most = int(found[1])
        lower = f"set data.vocab_size to {most}, " if most >= MIN_VOCAB_SIZE else ""
        return f"its text has only {most} pieces; {lower}add text"
    if found := re.search(r"required_chars\. \d+ vs (\d+)", message):
        return f"its characters alone are {found[1]} pieces; set data.vocab_size to that or more"
    if ".empty()" in message:
        return "there is no text to train it on; add text"
    return "SentencePiece refuses the text; set another data.vocab_size"
