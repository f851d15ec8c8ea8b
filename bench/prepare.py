"""What `demix prepare` costs on top of its tokenizer, on one core (docs/benchmarks.md).

    python bench/prepare.py [--megabytes 20 --rounds 5]

Text is that of the embedded corpus. Each round times, one after the other and in one thread, the
tokenizer's own library on the same documents, in memory, and `demix prepare` from a file of JSON
lines to token files. Medians of rounds; MB are of UTF-8 text.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"

import sentencepiece
import tokenizers

from demix_jax.config.schema import Config, DataConfig, ModelConfig
from demix_jax.data.prepare.prepare import prepare
from demix_jax.data.prepare.train_tokenizer import train_sentencepiece
from demix_jax.data.sources import embedded

_BATCH = 256  # documents in one call of a tokenizer


def main() -> None:
    """Prints one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        print(f"{'tokenizer':24} {'alone':>8} {'prepare':>8} {'overhead':>9}   MB/s, one core")
        for label, size, library, ours in measure(Path(name), given.megabytes, given.rounds):
            over = f"{ours / library - 1:9.0%}" if label != "bytes" else f"{'-':>9}"
            print(f"{label:24} {size / library:8.1f} {size / ours:8.1f} {over}", flush=True)


def measure(
    folder: Path, megabytes: float, rounds: int
) -> Iterator[tuple[str, float, float, float]]:
    """Yields label, MB of text, and median seconds of the tokenizer alone and of prepare."""
    texts = list(_documents(megabytes * 1e6))
    lines = (json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "text.jsonl").write_text("".join(lines))
    size = sum(len(text.encode()) for text in texts) / 1e6
    for label, definition, alone in _tokenizers(folder, texts[:: max(1, len(texts) // 2000)]):
        pairs = [
            (_seconds(alone, texts), _seconds(_prepare, folder, definition)) for _ in range(rounds)
        ]
        library, ours = (statistics.median(times) for times in zip(*pairs, strict=True))
        yield label, size, library, ours


def _documents(size: float) -> Iterator[str]:
    """Documents of all domains in turn, from the beginning again when there are no more."""
    names = embedded.TRAIN_DOMAINS + embedded.NOVEL_DOMAINS
    rows = itertools.zip_longest(*(embedded.read_domain(name) for name in names))
    found = [document.text for row in rows for document in row if document]
    for text in itertools.cycle(found):
        yield text
        size -= len(text.encode())
        if size <= 0:
            return


def _tokenizers(
    folder: Path, sample: list[str]
) -> Iterator[tuple[str, str, Callable[[list[str]], object]]]:
    """Label, definition for the config, and the library's own call on all texts."""
    yield "bytes", "bytes", lambda texts: [text.encode() for text in texts]
    path = folder / "pieces.model"
    with contextlib.redirect_stderr(io.StringIO()):
        train_sentencepiece(sample, 32_000, path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    yield (
        "sentencepiece, 32,000",
        str(path),
        lambda texts: [pieces.encode(batch, num_threads=1) for batch in _batches(texts)],
    )
    model = tokenizers.ByteLevelBPETokenizer()
    model.train_from_iterator(sample, 50_257, show_progress=False)
    model.save(str(folder / "bpe.json"))
    bpe = tokenizers.Tokenizer.from_file(str(folder / "bpe.json"))
    yield (
        f"byte-level BPE, {bpe.get_vocab_size():,}",
        str(folder / "bpe.json"),
        lambda texts: [[e.ids for e in bpe.encode_batch_fast(b)] for b in _batches(texts)],
    )


def _batches(texts: list[str]) -> Iterator[list[str]]:
    return (texts[i : i + _BATCH] for i in range(0, len(texts), _BATCH))


def _prepare(folder: Path, definition: str) -> None:
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        data = DataConfig(sources=(f"text={folder}/text.jsonl",), dir=out, tokenizer=definition)
        prepare(Config(data=data, model=ModelConfig(context=128)).validate(), workers=1)


def _seconds(call: Callable[..., object], *arguments: object) -> float:
    start = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
