"""Copies that `demix prepare` leaves out, against a comparison of all documents with each other."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import case, folders
from preparing import (
    build_of,
    changed,
    contents,
    here,
    make_config,
    parts_of,
    spell,
    stamps,
    write_domain,
)

from demix_jax.data.dataset import PreparedData
from demix_jax.data.prepare.prepare import prepare
from demix_jax.data.sources.base import SPLITS

pytestmark = pytest.mark.slow

Kind = str
NONE = {f"{kind}_{place}": 0 for kind in ("exact", "near") for place in ("within", "across")}


def random_text(rng: np.random.Generator) -> str:
    return " ".join(f"w{i}" for i in rng.integers(0, 3000, rng.integers(40, 90)))


def alter(rng: np.random.Generator, text: str, kind: Kind) -> str:
    """The same words, nearly the same, or only half of them the same."""
    words = text.split()
    if kind == "spaced":
        return " \n".join(words) + "\t"
    if kind == "near":
        return " ".join([*words[:-1], "other"])
    return " ".join([*words[: len(words) // 2], *random_text(rng).split()]) if kind else text


def planted(seed: int) -> list[tuple[str, str]]:
    """(split, text) of documents in order, of which many are copies of others."""
    rng = np.random.default_rng(seed)
    found = [(str(rng.choice(SPLITS, p=[0.7, 0.1, 0.2])), random_text(rng)) for _ in range(80)]
    for _ in range(120):
        _, text = found[rng.integers(len(found))]
        kind = str(rng.choice(["", "spaced", "near", "half"]))
        split = str(rng.choice(SPLITS, p=[0.6, 0.2, 0.2]))
        found.insert(rng.integers(len(found)), (split, alter(rng, text, kind)))
    return found


def similarity(one: str, other: str) -> float:
    """Jaccard similarity of the sets of word 5-grams."""
    grams = []
    for words in (one.split(), other.split()):
        grams.append({tuple(words[i : i + 5]) for i in range(len(words) - 4)})
    return len(grams[0] & grams[1]) / max(1, len(grams[0] | grams[1]))


def survivors(
    documents: list[tuple[str, str]], near: bool
) -> tuple[dict[str, list[str]], dict[str, dict[str, int]]]:
    """The texts of each split that remain, and the counts of those that do not."""
    counts = {split: {"documents": 0} | NONE for split in SPLITS}
    order = [
        i
        for wanted in ("test", "valid", "train")
        for i, (split, _) in enumerate(documents)
        if split == wanted
    ]
    first: dict[str, int] = {}
    kept: list[int] = []
    for i in order:
        split, text = documents[i]
        counts[split]["documents"] += 1
        earlier = first.setdefault(" ".join(text.split()), i)
        kind = "exact"
        if earlier == i:
            alike = (j for j in kept if near and similarity(text, documents[j][1]) >= 0.8)
            earlier, kind = next(alike, i), "near"
        if earlier == i:
            kept.append(i)
        else:
            place = "within" if documents[earlier][0] == split else "across"
            counts[split][f"{kind}_{place}"] += 1
    texts = {s: [documents[i][1] for i in sorted(kept) if documents[i][0] == s] for s in SPLITS}
    return texts, counts


def write_documents(folder: Path, name: str, documents: list[tuple[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"text": text, "split": split}) + "\n" for split, text in documents]
    (folder / f"{name}.jsonl").write_text("".join(rows))


def test_what_remains_is_what_comparing_all_with_all_leaves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = folders(tmp_path)
    for dedup in ["exact", "near"]:
        for part_bytes in [3000, 10**9]:
            with case(dedup, part_bytes):
                folder = next(fresh)
                documents = planted(0)
                texts, counts = survivors(documents, dedup == "near")
                write_documents(folder / "texts", "law", documents)
                metas = here(make_config(folder, dedup=dedup, part_bytes=part_bytes))
                data = PreparedData(folder / "data")
                for split in SPLITS:
                    assert data.tokens("law", split)[:].tolist() == spell(texts[split])
                    assert data.index("law", split)[:, 1].tolist() == [
                        len(t.encode()) for t in texts[split]
                    ]
                assert metas["law"]["duplicates"] == counts
                total = {key: sum(count[key] for count in counts.values()) for key in NONE}
                assert all(total[key] > 3 for key in NONE if dedup in key)
                row = next(
                    line for line in capsys.readouterr().out.splitlines() if line.startswith("law")
                )
                said = [int(number) for number in re.findall(r"(\d+) (?:exact|near|across)", row)]
                assert said == [
                    total["exact_within"] + total["exact_across"],
                    total["exact_across"],
                    total["near_within"] + total["near_across"],
                    total["near_across"],
                ]


RUNNERS: list[Any] = [
    {"workers": 2},
    {"runner": "DirectRunner"},
    pytest.param({"workers": 4}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("runner", RUNNERS)
def test_all_runners_leave_out_the_same(tmp_path: Path, runner: dict[str, Any]) -> None:
    write_documents(tmp_path / "texts", "law", planted(0))
    write_documents(tmp_path / "texts", "med", planted(1))
    config = make_config(tmp_path, dedup="near", part_bytes=3000)
    prepare(config, **runner)
    here(changed(config, dir=str(tmp_path / "other")))
    assert contents(tmp_path / "data") == contents(tmp_path / "other")


def test_repairing_a_part_leaves_out_the_same(tmp_path: Path) -> None:
    write_documents(tmp_path / "texts", "law", planted(0))
    config = make_config(tmp_path, dedup="near", part_bytes=3000)
    here(config)
    whole, before = contents(tmp_path / "data"), stamps(tmp_path / "data")
    (build_of(tmp_path / "data" / "law") / "train-00001.tokens").unlink()
    here(config)
    assert contents(tmp_path / "data") == whole
    after = stamps(tmp_path / "data")
    redone = {name for name in before if after[name] != before[name]}
    assert redone - {"law/meta.json"} == set(parts_of(before, 1))
    (build_of(tmp_path / "data" / "law") / "00002.drop.npy").unlink()
    here(config)
    assert contents(tmp_path / "data") == whole


def three_domains(folder: Path) -> None:
    """law and med have five documents in common, one of them twice; news has none."""
    rng = np.random.default_rng(0)
    texts = {
        name: {split: [random_text(rng) for _ in range(20)] for split in SPLITS}
        for name in ("law", "med", "news")
    }
    texts["med"]["train"][:3] = texts["law"]["train"][5:8]
    texts["med"]["valid"][4] = texts["law"]["test"][9]
    texts["med"]["test"][2] = texts["med"]["test"][7] = texts["law"]["valid"][1]
    for name in texts:
        write_domain(folder, name, texts[name])


WARNING = "warning: domains 'law' and 'med' have 5 documents in common"


def test_documents_in_two_domains_are_counted_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fresh = folders(tmp_path)
    for dedup in ["none", "near"]:
        with case(dedup):
            folder = next(fresh)
            three_domains(folder / "texts")
            for part_bytes in (10**9, 10**9, 1000):
                here(make_config(folder, dedup=dedup, part_bytes=part_bytes))
                printed = capsys.readouterr().out.splitlines()
                assert [line for line in printed if "warning" in line] == [WARNING]


def test_count_of_common_documents_follows_the_domains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three_domains(tmp_path / "texts")
    config = make_config(tmp_path)
    here(config)
    assert WARNING in capsys.readouterr().out
    here(changed(config, train_domains=("med", "news")))
    assert "warning" not in capsys.readouterr().out
    here(changed(config, train_domains=("law",), novel_domains=("med",)))
    assert WARNING in capsys.readouterr().out
    source = tmp_path / "texts" / "law.jsonl"
    whole = source.read_text()
    source.write_text("".join(whole.splitlines(keepends=True)[6:]))
    here(config)
    assert "have 4 documents in common" in capsys.readouterr().out


def test_count_of_common_documents_survives_an_interruption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run that ended after the domains were written, before it was noted what they share."""
    three_domains(tmp_path / "texts")
    config = make_config(tmp_path)
    here(config)
    old = (tmp_path / "data" / "data.json").read_bytes()
    source = tmp_path / "texts" / "law.jsonl"
    source.write_text("".join(source.read_text().splitlines(keepends=True)[6:]))
    here(config)
    (tmp_path / "data" / "data.json").write_bytes(old)
    capsys.readouterr()
    here(config)
    assert "have 4 documents in common" in capsys.readouterr().out
