"""What finding duplicate documents costs (docs/benchmarks.md).

    python bench/dedup.py [--megabytes 20 --documents 100000 --parts 64 --rounds 5]

First the signatures, in MB of UTF-8 text per second of one core, for text of the embedded corpus.
Then the decision over documents of 100 random words, of which a tenth are exact copies and a tenth
copies with one word changed, from files: time, and the peak of memory that Python and NumPy
allocate, per document. Medians of rounds.
"""

import argparse
import itertools
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from demix_jax.data.prepare.dedup import Signatures, compute_signatures, find_duplicates
from demix_jax.data.sources import embedded

_WORDS = 100  # of a random document


def main() -> None:
    """Prints two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=20.0)
    for name, default in (("documents", 100_000), ("parts", 64), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    texts = list(itertools.islice(_corpus(), 2000))
    some = list(_first(given.megabytes * 1e6, itertools.cycle(texts)))
    size = sum(len(text.encode()) for text in some)
    words = sum(len(text.split()) for text in some)
    print(
        f"signatures of {size / 1e6:.1f} MB: {len(some):,} documents, {size / words:.1f} bytes/word"
    )
    for near in (False, True):
        seconds = _seconds(
            lambda near=near: compute_signatures((("train", t) for t in some), near), given
        )
        print(f"{'near' if near else 'exact':6} {size / seconds / 1e6:8.1f} MB/s of a core")
    with tempfile.TemporaryDirectory() as folder:
        paths = _write_parts(Path(folder), texts, given.documents, given.parts)
        print(f"decision over {given.documents:,} documents in {len(paths)} parts")
        for near in (False, True):
            find: Callable = lambda near=near: find_duplicates(paths, near)  # noqa: E731
            masks, _ = find()
            seconds, peak = _seconds(find, given), _peak(find)
            print(
                f"{'near' if near else 'exact':6} {seconds / given.documents * 1e6:8.1f} us "
                f"{peak / given.documents:8.0f} bytes a document; "
                f"{sum(int(mask.sum()) for mask in masks):,} dropped"
            )


def _corpus() -> Iterator[str]:
    """Documents of all domains of the embedded corpus in turn."""
    names = embedded.TRAIN_DOMAINS + embedded.NOVEL_DOMAINS
    for row in itertools.zip_longest(*(embedded.read_domain(name) for name in names)):
        yield from (document.text for document in row if document)


def _first(size: float, texts: Iterator[str]) -> Iterator[str]:
    for text in texts:
        yield text
        size -= len(text.encode())
        if size <= 0:
            return


def _write_parts(folder: Path, texts: list[str], documents: int, parts: int) -> list[Path]:
    rng = np.random.default_rng(0)
    vocabulary = np.array(sorted({word for text in texts for word in text.split()}))
    drawn = rng.integers(0, len(vocabulary), (documents, _WORDS))
    kinds = rng.choice(3, documents, p=[0.8, 0.1, 0.1])  # new, exact copy, near copy
    kinds[0] = 0
    for i in np.flatnonzero(kinds):
        drawn[i] = drawn[rng.integers(0, i)]
    for i in np.flatnonzero(kinds == 2):
        drawn[i, rng.integers(0, _WORDS)] = rng.integers(0, len(vocabulary))
    splits = rng.choice(["train", "valid", "test"], documents, p=[0.9, 0.05, 0.05])
    paths = [folder / f"{i}.signatures" for i in range(parts)]
    for path, rows in zip(paths, np.array_split(np.arange(documents), parts), strict=True):
        found: Signatures = compute_signatures(
            ((str(splits[i]), " ".join(vocabulary[drawn[i]])) for i in rows), near=True
        )
        found.save(path)
    return paths


def _seconds(call: Callable[[], object], given: argparse.Namespace) -> float:
    """Of processor time."""
    times = []
    for _ in range(given.rounds):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def _peak(call: Callable[[], object]) -> int:
    tracemalloc.start()
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


if __name__ == "__main__":
    main()
