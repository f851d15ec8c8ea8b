"""The embedded corpus: the same text everywhere, of the promised size, parted cleanly."""

import functools
import os
import subprocess
import sys
from collections import Counter
from importlib import metadata
from pathlib import Path

import pytest
from cases import case

from demix_jax.data.sources import embedded
from demix_jax.data.sources.base import Document
from demix_jax.errors import DemixError

DOMAINS = embedded.TRAIN_DOMAINS + embedded.NOVEL_DOMAINS
# Others have at least 1.2.
MEGABYTES = {"readme": 0.6, "cython": 1.0, "c": 1.0} | {"italian": 0.55, "germanic": 0.7}
MEGABYTES |= {"romance": 0.9, "slavic": 1.0}
BY_SECTION = ("music", "romance", "slavic", "c", "readme", "italian", "germanic")
DIGEST = """
import hashlib, sys
from demix_jax.data.sources import embedded
for name in sys.argv[1:]:
    documents = repr(list(embedded.read_domain(name)))
    print(name, hashlib.sha256(documents.encode()).hexdigest(), embedded.fingerprint(name))
print(*sorted({module.partition(".")[0] for module in sys.modules}))
"""


@functools.cache
def read(name: str) -> tuple[Document, ...]:
    return tuple(embedded.read_domain(name))


def file_of(document: Document) -> str:
    return document.id.rpartition("#")[0]


def long_lines(documents: list[Document]) -> list[str]:
    lines = [line.strip() for document in documents for line in document.text.split("\n")]
    return [line for line in lines if len(line) >= 50]


def in_split(name: str, split: str) -> list[Document]:
    return [document for document in read(name) if document.split == split]


@pytest.fixture(scope="module")
def elsewhere() -> list[list[str]]:
    """What two other processes read, with other hashes of strings; lines of output of each."""
    names = ["stubs", "legal", "music", "romance", "cython", "kern", "readme"]
    command = [sys.executable, "-c", DIGEST, *names]
    root = str(Path(__file__).parent.parent)
    runs = [
        subprocess.Popen(
            command, env=os.environ | {"PYTHONHASHSEED": seed}, cwd=root, stdout=subprocess.PIPE
        )
        for seed in ("1", "2")
    ]
    outputs = [run.communicate()[0].decode().splitlines() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    return outputs


@pytest.mark.slow
def test_two_processes_read_the_same(elsewhere: list[list[str]]) -> None:
    assert elsewhere[0][:-1] == elsewhere[1][:-1]


@pytest.mark.slow
def test_what_is_read_is_not_imported(elsewhere: list[list[str]]) -> None:
    imported = set(elsewhere[0][-1].split())
    assert not imported & {"tensorflow", "music21", "django", "jedi", "scipy", "pygments"}


def test_there_are_eight_domains_to_train_on_and_eight_novel_ones() -> None:
    assert len(embedded.TRAIN_DOMAINS) == len(embedded.NOVEL_DOMAINS) == 8
    assert len(set(DOMAINS)) == 16


@pytest.mark.slow
def test_domain_is_as_large_as_promised() -> None:
    for name in DOMAINS:
        with case(name):
            sizes = Counter[str | None]()
            for document in read(name):
                sizes[document.split] += len(document.text.encode())
            assert 1e6 * MEGABYTES.get(name, 1.2) <= sizes.total() <= embedded.MAX_BYTES
            assert set(sizes) == {"train", "valid", "test"}
            assert min(sizes.values()) >= 30_000
            assert sizes["train"] >= 0.7 * sizes.total()


@pytest.mark.slow
def test_documents_are_neither_too_short_nor_too_long() -> None:
    for name in DOMAINS:
        with case(name):
            assert all(200 <= len(document.text) <= 20_000 for document in read(name))


@pytest.mark.slow
def test_no_file_is_in_two_splits() -> None:
    for name in DOMAINS:
        with case(name):
            documents = read(name)
            assert len({document.id for document in documents}) == len(documents)
            if name not in BY_SECTION:
                splits = {(file_of(document), document.split) for document in documents}
                assert len(splits) == len({file_of(document) for document in documents})


@pytest.mark.slow
def test_no_file_fills_half_a_split() -> None:
    for name in DOMAINS:
        with case(name):
            for split in ("train", "valid", "test"):
                files = Counter[str]()
                for document in in_split(name, split):
                    files[file_of(document)] += len(document.text)
                assert files.most_common(1)[0][1] <= files.total() / 2


@pytest.mark.slow
def test_test_text_is_not_a_copy_of_training_text() -> None:
    for name in DOMAINS:
        with case(name):
            known = set(long_lines(in_split(name, "train")))
            lines = long_lines(in_split(name, "test"))
            assert sum(line in known for line in lines) <= 0.15 * len(lines)


@pytest.mark.slow
def test_no_document_occurs_twice_in_the_whole_corpus() -> None:
    texts = Counter(" ".join(document.text.split()) for name in DOMAINS for document in read(name))
    assert texts.most_common(1)[0][1] == 1


@pytest.mark.slow
def test_no_text_names_a_path_of_this_machine() -> None:
    here = str(metadata.distribution("music21").locate_file(""))
    paths = [path for path in (here, sys.prefix) if path != "/usr"]
    texts = "\n".join(document.id + document.text for name in DOMAINS for document in read(name))
    assert not [path for path in paths if path in texts]


def test_fingerprints_differ_between_domains_and_repeat() -> None:
    fingerprints = [embedded.fingerprint(name) for name in DOMAINS]
    assert len(set(fingerprints)) == len(DOMAINS)
    assert fingerprints == [embedded.fingerprint(name) for name in DOMAINS]


def test_fingerprint_follows_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = embedded.fingerprint("tests"), embedded.fingerprint("music")
    monkeypatch.setattr(metadata.Distribution, "version", "0.0.1")
    assert embedded.fingerprint("tests") != before[0]
    assert embedded.fingerprint("music") != before[1]


def test_unknown_domain_is_answered_with_the_known_ones() -> None:
    for ask in [embedded.fingerprint, lambda name: next(embedded.read_domain(name))]:
        message = "no domain 'sonnets'.*python.*slavic.*germanic"
        with case(ask), pytest.raises(DemixError, match=message):
            ask("sonnets")


def test_missing_distribution_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(DemixError, match="'pygments', which is not installed"):
        next(embedded.read_domain("lexers"))
