"""Removing duplicate documents, against brute force over the texts themselves."""

import functools
import hashlib
import math
import os
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from cases import case, folders

from demix_jax.data.prepare import dedup
from demix_jax.data.prepare.dedup import (
    NUM_PERM,
    Signatures,
    common_documents,
    compute_signatures,
    find_duplicates,
)
from demix_jax.data.sources.base import SPLITS
from demix_jax.errors import DemixError

Documents = list[tuple[str, str]]  # split, text
SPACES = (" ", "  ", "\n", "\t ", "\u00a0", " \r\n", "\u2003")
ORDER = ("test", "valid", "train")
DIGEST = """
import hashlib, sys
from demix_jax.data.prepare.dedup import compute_signatures
found = compute_signatures([("train", f"some words é {i} " * i) for i in range(40)], near=True)
parts = (found.splits, found.keys, found.digests)
print(hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest())
"""


def words(rng: np.random.Generator, count: int) -> list[str]:
    return [f"w{i}" for i in rng.integers(0, 5000, count)]


def spaced(rng: np.random.Generator, parts: Sequence[str]) -> str:
    """The same words between other whitespace."""
    return "".join(SPACES[rng.integers(len(SPACES))] + part for part in parts) + "\n"


def edited(rng: np.random.Generator, parts: Sequence[str], share: float) -> list[str]:
    """A copy in which a share of the words are others."""
    found = list(parts)
    for place in rng.choice(len(found), round(share * len(found)), replace=False):
        found[place] = f"other{rng.integers(10**9)}"
    return found


def random_splits(rng: np.random.Generator, texts: Sequence[str]) -> Documents:
    return [(SPLITS[rng.choice(3, p=[0.6, 0.2, 0.2])], text) for text in texts]


def corpus_with_copies(seed: int, near: float | None = None) -> Documents:
    """Texts of 1 to 120 words, of which many are copies of others, in random splits."""
    rng = np.random.default_rng(seed)
    originals = [words(rng, int(rng.integers(1, 120))) for _ in range(150)]
    copies = [originals[i] for i in rng.integers(0, 150, 100)]
    if near:
        copies += [edited(rng, originals[i], near) for i in rng.integers(0, 150, 100)]
    texts = [spaced(rng, text) for text in originals + copies] + ["", " \n", "\t"]
    return random_splits(rng, [texts[i] for i in rng.permutation(len(texts))])


def cut(documents: Documents, *ends: int) -> list[Documents]:
    bounds = [0, *ends, len(documents)]
    return [documents[a:b] for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


def drop(parts: list[Documents], near: bool, threshold: float = 0.8) -> tuple[list[bool], dict]:
    """The mask over all documents that are not empty, in the order given; and the counts."""
    masks, counts = find_duplicates(
        [compute_signatures(part, near) for part in parts], near, threshold
    )
    assert [len(mask) for mask in masks] == [sum(text != "" for _, text in p) for p in parts]
    return np.concatenate(masks).tolist(), counts


def considered(documents: Documents) -> list[int]:
    """Places of the documents in the order in which they are considered."""
    return sorted(range(len(documents)), key=lambda i: (ORDER.index(documents[i][0]), i))


def grams(text: str) -> set[tuple[str, ...]]:
    parts = text.split()
    return {tuple(parts[i : i + 5]) for i in range(max(1, len(parts) - 4))}


def jaccard(left: set, right: set) -> float:
    return len(left & right) / len(left | right)


def test_exact_copies_are_dropped_as_by_sets():
    for ends in [(), (1,), (50, 50, 120)]:
        with case(ends):
            documents = [d for d in corpus_with_copies(0) if d[1]]
            seen: dict[str, str] = {}
            expected, reasons = [False] * len(documents), Counter()
            for i in considered(documents):
                split, text = documents[i]
                words_of = " ".join(text.split())
                if words_of in seen:
                    expected[i] = True
                    reasons[split, seen[words_of] == split] += 1
                else:
                    seen[words_of] = split
            found, counts = drop(cut(documents, *ends), near=False)
            assert found == expected
            assert sum(expected) > 80
            for split in SPLITS:
                mine = counts[split]
                assert mine.documents == sum(s == split for s, _ in documents)
                assert (mine.exact_within, mine.exact_across) == (
                    reasons[split, True],
                    reasons[split, False],
                )
                assert (mine.near_within, mine.near_across) == (0, 0)
                assert sum(mine[1:]) == sum(
                    d for d, (s, _) in zip(expected, documents, strict=True) if s == split
                )
            assert min(reasons[s, True] for s in SPLITS) > 0
            assert min(reasons["train", False], reasons["valid", False]) > 0


def test_a_copy_differs_in_whitespace_only():
    same = ["a b\nc", " a  b c\t", "a\u00a0b\u2028c"]
    other = ["A b c", "a b c.", "ab c", "a b", "a b c c", "c b a"]
    found, _ = drop([[("train", text) for text in same + other]], near=False)
    assert found == [False, True, True] + [False] * 6


def test_held_out_text_stays_and_test_beats_valid():
    parts = [
        [("train", "a b"), ("valid", "a b")],
        [("valid", "c d"), ("test", "a  b")],
        [("train", "c d")],
    ]
    found, counts = drop(parts, near=False)
    assert found == [True, True, False, False, True]
    assert counts["train"][1:] == (0, 2, 0, 0)
    assert counts["valid"][1:] == (0, 1, 0, 0)
    assert sum(counts["test"][1:]) == 0


def test_many_buckets_of_keys_decide_as_one(monkeypatch):
    documents = corpus_with_copies(1)
    whole = drop(cut(documents, 90), near=False)
    monkeypatch.setattr(dedup, "_BUCKET", 20)  # makes 18 buckets
    assert drop(cut(documents, 90), near=False) == whole
    assert sum(whole[0]) > 80


def test_both_halves_of_a_key_count():
    keys = np.array([[1, 2], [1, 3], [2, 3], [1, 2], [2, 3]], np.uint64)
    part = Signatures(np.zeros(5, np.uint8), keys, np.zeros((5, 0), np.uint32))
    assert find_duplicates([part], near=False)[0][0].tolist() == [False, False, False, True, True]


def test_a_copy_of_a_near_copy_counts_as_exact():
    text = " ".join(words(np.random.default_rng(14), 400))
    near = text + " and more"
    documents = [
        ("train", near),
        ("test", text),
        ("train", near.replace(" ", "  ")),
        ("valid", "x"),
    ]
    found, counts = drop([documents], near=True)
    assert found == [True, False, True, False]
    assert counts["train"] == (2, 1, 0, 0, 1)


def test_edited_copies_are_found_and_others_kept():
    rng = np.random.default_rng(3)
    originals = [words(rng, 300) for _ in range(60)]
    slightly = [edited(rng, text, rng.uniform(0.02, 0.05)) for text in originals[:30]]
    largely = [edited(rng, text, 0.25) for text in originals[30:]]
    texts = [" ".join(text) for text in originals + slightly + largely]
    similarity = [jaccard(grams(texts[i]), grams(texts[60 + i])) for i in range(60)]
    assert min(similarity[:30]) > 0.55
    assert max(similarity[30:]) < 0.2
    found, counts = drop([[("train", text) for text in texts]], near=True, threshold=0.5)
    assert found == [False] * 60 + [True] * 30 + [False] * 30
    assert counts["train"] == (120, 0, 0, 30, 0)


def test_estimates_lie_around_the_true_similarity():
    rng = np.random.default_rng(4)
    errors = []
    for share in np.linspace(0, 0.1, 100):
        text = words(rng, int(rng.integers(20, 2000)))
        pair = [" ".join(text), " ".join(edited(rng, text, share))]
        left, right = compute_signatures([("train", text) for text in pair], near=True).digests
        truth = jaccard(*map(grams, pair))
        errors.append((np.mean(left == right) - truth) / math.sqrt(0.25 / NUM_PERM))
    assert abs(np.mean(errors)) < 0.3  # the mean of 100 has a deviation of at most 0.1
    assert np.abs(errors).max() < 4


def test_minhash_values_follow_their_definition():
    """In Python's integers: a crc32, murmur3's finaliser, odd a times it plus b modulo 2**32."""
    gen = np.random.RandomState(1)
    a = gen.randint(0, 2**31, NUM_PERM, dtype=np.uint32).tolist()
    b = gen.randint(0, 2**32, NUM_PERM, dtype=np.uint32).tolist()
    long = " ".join(words(np.random.default_rng(5), 2500))  # several chunks of grams
    texts = [long, "one two  three four five six", "four words of text", "é", " \n"]

    def mix(h: int) -> int:
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            h = ((h ^ (h >> shift)) * factor) % 2**32
        return h

    for text, digest in zip(
        texts, compute_signatures([("valid", t) for t in texts], near=True).digests, strict=True
    ):
        hashes = [mix(zlib.crc32(" ".join(gram).encode())) for gram in grams(text)]
        expected = [
            min(((2 * x + 1) * h + y) % 2**32 for h in hashes) for x, y in zip(a, b, strict=True)
        ]
        assert digest.tolist() == expected


def greedy(digests: np.ndarray, order: list[int], threshold: float) -> dict[int, int]:
    """The document kept instead of each one dropped, every pair compared."""
    needed = math.ceil(threshold * NUM_PERM - 1e-9)
    kept: list[int] = []
    instead = {}
    matrix = np.empty_like(digests)
    for i in order:
        alike = np.flatnonzero((matrix[: len(kept)] == digests[i]).sum(1) >= needed)
        if alike.size:
            instead[i] = kept[alike[0]]
        else:
            matrix[len(kept)] = digests[i]
            kept.append(i)
    return instead


def families(seed: int, count: int) -> Signatures:
    """MinHash values of documents that share 70 to 100 % of them with an ancestor."""
    rng = np.random.default_rng(seed)
    ancestors = rng.integers(0, 2**32, (count // 4, NUM_PERM), dtype=np.uint32)
    digests = ancestors[rng.integers(0, len(ancestors), count)]
    fresh = rng.random((count, NUM_PERM)) < rng.uniform(0, 0.3, (count, 1)) ** 2
    digests[fresh] = rng.integers(0, 2**32, int(fresh.sum()), dtype=np.uint32)
    return Signatures(
        rng.choice(3, count, p=[0.8, 0.1, 0.1]).astype(np.uint8),
        rng.integers(0, 2**64, (count, 2), dtype=np.uint64),
        digests,
    )


@pytest.mark.parametrize(("count", "threshold"), [(400, 0.5), (5000, 0.8), (400, 0.95), (400, 1.0)])
def test_near_copies_are_dropped_as_by_comparing_every_pair(count, threshold):
    """With many blocks and merges; a pair at the very threshold may be overlooked."""
    part = families(6, count)
    order = sorted(range(count), key=lambda i: (2 - int(part.splits[i]), i))
    instead = greedy(part.digests, order, threshold)
    masks, counts = find_duplicates([part], near=True, threshold=threshold)
    found = set(np.flatnonzero(masks[0]))
    assert len(instead) > count / 20
    assert len(found ^ set(instead)) <= count / 100
    if not found ^ set(instead):
        for i, split in enumerate(SPLITS):
            within = [
                part.splits[x] == part.splits[y] for x, y in instead.items() if part.splits[x] == i
            ]
            assert counts[split][1:] == (0, 0, sum(within), len(within) - sum(within))


def test_a_copy_of_a_dropped_document_stays():
    """Only kept documents count: a is like b, b like c, a not like c; so b goes and c stays."""
    rng = np.random.default_rng(7)
    a = rng.integers(0, 2**32, NUM_PERM, dtype=np.uint32)
    b, c = a.copy(), a.copy()
    b[:16] += 1
    c[:16] += 1
    c[16:32] += 1
    near = Signatures(
        np.zeros(3, np.uint8), np.arange(6, dtype=np.uint64).reshape(3, 2), np.stack([a, b, c])
    )
    assert find_duplicates([near], near=True, threshold=0.8)[0][0].tolist() == [False, True, False]


def test_the_result_does_not_depend_on_the_parts():
    for ends in [(1,), (100, 200), (10, 10, 11, 250, 300)]:
        with case(ends):
            documents = corpus_with_copies(8, near=0.03)
            whole = drop([documents], near=True, threshold=0.7)
            assert drop(cut(documents, *ends), near=True, threshold=0.7) == whole
            assert sum(counts.near_across for counts in whole[1].values()) > 10


@pytest.mark.slow
def test_small_blocks_decide_as_large_ones(monkeypatch):
    part = families(9, 1500)
    whole = find_duplicates([part], near=True)
    monkeypatch.setattr(dedup, "_BLOCK", 7)
    monkeypatch.setattr(dedup, "_PAIRS", 5)
    small = find_duplicates([part], near=True)
    assert np.array_equal(whole[0][0], small[0][0])
    assert whole[1] == small[1]
    assert whole[0][0].sum() > 300


def test_many_alike_documents_cost_one_index_entry():
    """Every document is a candidate of every other one."""
    rng = np.random.default_rng(10)
    digests = np.tile(rng.integers(0, 2**32, NUM_PERM, dtype=np.uint32), (5000, 1))
    digests[np.arange(5000), rng.integers(0, NUM_PERM, 5000)] += 1
    keys = rng.integers(0, 2**64, (5000, 2), dtype=np.uint64)
    masks, _ = find_duplicates([Signatures(np.zeros(5000, np.uint8), keys, digests)], near=True)
    assert masks[0].tolist() == [False] + [True] * 4999


@pytest.mark.slow
def test_signatures_are_the_same_in_every_process():
    found = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    here = compute_signatures([("train", f"some words é {i} " * i) for i in range(40)], near=True)
    arrays = (here.splits, here.keys, here.digests)
    digest = hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
    assert found == {f"{digest}\n"}


def test_saved_signatures_decide_as_those_in_memory(tmp_path):
    documents = corpus_with_copies(11, near=0.03)
    parts = [compute_signatures(part, near=True) for part in [*cut(documents, 7, 7, 200), []]]
    paths = [tmp_path / f"{i}.signatures" for i in range(len(parts))]
    for part, path in zip(parts, paths, strict=True):
        part.save(path)
    assert sorted(path.parent.iterdir()) == sorted(paths)
    for near in (False, True):
        saved, memory = find_duplicates(paths, near), find_duplicates(parts, near)
        assert [m.tolist() for m in saved[0]] == [m.tolist() for m in memory[0]]
        assert saved[1] == memory[1]
    assert saved[1]["train"].near_across > 0


@pytest.fixture
def few_files():
    """Leaves the process 40 files to open."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 40, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_parts_than_files_may_be_open(tmp_path, monkeypatch, few_files):
    monkeypatch.setattr(dedup, "_FILES", 20)
    documents = corpus_with_copies(12, near=0.03)
    parts = [compute_signatures([document], near=True) for document in documents]
    paths = [tmp_path / str(i) for i in range(len(parts))]
    for part, path in zip(parts, paths, strict=True):
        part.save(path)
    masks, counts = find_duplicates(paths, near=True)
    assert (np.concatenate(masks).tolist(), counts) == drop([documents], near=True)


def test_no_documents_at_all():
    masks, counts = find_duplicates([compute_signatures([("train", "")], near=True)], near=True)
    assert [mask.tolist() for mask in masks] == [[]]
    assert set(counts.values()) == {(0, 0, 0, 0, 0)}
    assert find_duplicates([], near=True)[0] == []


def test_a_damaged_file_is_an_error(tmp_path):
    fresh = folders(tmp_path)
    for damage in ["truncated", "text", "empty", "missing"]:
        with case(damage):
            folder = next(fresh)
            path = folder / "part"
            compute_signatures([("train", "some text")], near=True).save(path)
            if damage == "missing":
                path.unlink()
            else:
                data = path.read_bytes()
                path.write_bytes(
                    {"truncated": data[:-1], "text": b"some text", "empty": b""}[damage]
                )
            with pytest.raises(DemixError, match="part.*demix prepare"):
                find_duplicates([path], near=True)


def test_near_copies_need_their_signatures():
    with pytest.raises(DemixError, match="exact copies only"):
        find_duplicates([compute_signatures([("train", "a")], near=False)], near=True)


def test_a_threshold_is_a_similarity():
    for threshold in [0, 0.49, 1.01, 80, math.nan]:
        with case(threshold), pytest.raises(DemixError, match="use 0.5 to 1"):
            find_duplicates(
                [compute_signatures([("train", "a")], near=True)], near=True, threshold=threshold
            )


def test_without_the_library_exact_copies_are_still_found(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    assert drop([[("train", "a b"), ("train", "a  b")]], near=False)[0] == [False, True]
    with pytest.raises(DemixError, match=r"demix_jax\[dedup\]"):
        compute_signatures([("train", "a b")], near=True)


def test_text_that_is_no_unicode_has_a_signature():
    found, _ = drop(
        [[("train", "\ud800 x"), ("train", "\ud800  x"), ("train", "\ud801 x")]], near=True
    )
    assert found == [False, True, False]


def save_arrays(folder: Path, arrays: Sequence[np.ndarray]) -> Callable[[], Iterator[np.ndarray]]:
    """Saves arrays; the result reads them from their files, each opened when it is needed."""
    folder.mkdir()
    paths = [folder / f"{i}.npy" for i in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        np.save(path, array)
    return lambda: (np.load(path, mmap_mode="r") for path in paths)


def test_common_documents_are_counted_as_by_sets(monkeypatch, tmp_path, few_files):
    rng = np.random.default_rng(13)
    pool = rng.integers(0, 2**64, 300, dtype=np.uint64)
    keys = {
        "a": [rng.choice(pool, 2) for _ in range(60)],
        "b": [rng.choice(pool, 20), rng.choice(pool, 0), rng.choice(pool, 30)],
        "c": [rng.integers(0, 2**64, 50, dtype=np.uint64)],
        "d": [],
        "e": [pool],
    }
    sets = {name: {int(k) for array in arrays for k in array} for name, arrays in keys.items()}
    expected = {(x, y): len(sets[x] & sets[y]) for x, y in (("a", "b"), ("a", "e"), ("b", "e"))}
    assert min(expected.values()) > 0
    readers = {name: functools.partial(iter, arrays) for name, arrays in keys.items()}
    saved = readers | {"a": save_arrays(tmp_path / "a", keys["a"])}
    for bucket in (2**22, 10):
        monkeypatch.setattr(dedup, "_BUCKET", bucket)
        with case(bucket):
            assert common_documents(readers) == expected
            assert common_documents(saved) == expected
            assert common_documents({}) == {}
