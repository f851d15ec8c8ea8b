"""`demix prepare` once more: after changes, interruptions, damage and full disks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import case, folders
from preparing import (
    PREPARE,
    ROOT,
    as_json,
    build_of,
    changed,
    contents,
    here,
    lines,
    make_config,
    parts_of,
    prepare_parts,
    prepare_two,
    read_tokens,
    spell,
    split_texts,
    stamps,
    write_domain,
    write_words,
)

from demix_jax.config.schema import Config
from demix_jax.config.serialization import from_dict
from demix_jax.data.dataset import PreparedData
from demix_jax.data.prepare.prepare import prepare
from demix_jax.data.sources.base import SPLITS
from demix_jax.errors import DemixError


@pytest.fixture
def two(tmp_path: Path) -> Config:
    return prepare_two(tmp_path)


@pytest.fixture
def parts(tmp_path: Path) -> Config:
    return prepare_parts(tmp_path)


def test_second_run_rebuilds_nothing(two: Config) -> None:
    before = stamps(Path(two.data.dir))
    assert before
    here(two)
    assert stamps(Path(two.data.dir)) == before


def test_changed_file_rebuilds_its_domain_only(two: Config, tmp_path: Path) -> None:
    before = stamps(tmp_path / "data")
    write_domain(tmp_path / "texts", "med", split_texts(7))
    here(two)
    after = stamps(tmp_path / "data")
    assert {n: s for n, s in after.items() if n.startswith(("law", "tokenizer"))} == {
        n: s for n, s in before.items() if n.startswith(("law", "tokenizer"))
    }
    assert read_tokens(tmp_path / "data" / "med", "train") == spell(split_texts(7)["train"])


def test_touched_file_rebuilds_nothing(two: Config, tmp_path: Path) -> None:
    before = stamps(tmp_path / "data")
    os.utime(tmp_path / "texts" / "law.jsonl", (10**9, 10**9))
    here(two)
    after = stamps(tmp_path / "data")
    assert after.pop("law/meta.json")
    assert before.pop("law/meta.json")
    assert after == before


def test_text_replaced_by_as_much_of_the_same_time_is_noticed(two: Config, tmp_path: Path) -> None:
    path = tmp_path / "texts" / "law.jsonl"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes().replace(b"alpha", b"omega"))
    os.utime(path, ns=times)
    here(two)
    texts = [text.replace("alpha", "omega") for text in split_texts(0)["train"]]
    assert texts != split_texts(0)["train"]
    assert read_tokens(tmp_path / "data" / "law", "train") == spell(texts)


def test_new_domain_joins_those_prepared(two: Config, tmp_path: Path) -> None:
    before = stamps(tmp_path / "data")
    write_domain(tmp_path / "texts", "chat", split_texts(3))
    here(two)
    after = stamps(tmp_path / "data")
    kept = {name: stamp for name, stamp in before.items() if name != "data.json"}
    assert {name: after[name] for name in kept} == kept
    assert PreparedData(tmp_path / "data").train == ("chat", "law", "med")


def test_text_file_moved_to_another_split_is_noticed(tmp_path: Path) -> None:
    for split in SPLITS:
        (tmp_path / "texts" / "law" / split).mkdir(parents=True)
        own = "z.txt" if split == "valid" else "a.txt"
        (tmp_path / "texts" / "law" / split / own).write_text(f"some text of {split}")
    (tmp_path / "texts" / "law" / "train" / "n.txt").write_text("moved")
    config = make_config(tmp_path)
    here(config)
    (tmp_path / "texts" / "law" / "train" / "n.txt").rename(
        tmp_path / "texts" / "law" / "valid" / "n.txt"
    )
    here(config)
    expected = spell(["moved", "some text of valid"])
    assert read_tokens(tmp_path / "data" / "law", "valid") == expected


CHANGES: dict[str, dict[str, Any]] = {
    "parts": {"part_bytes": 500},
    "exact copies": {"dedup": "exact"},
    "near copies": {"dedup": "near"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_options_rebuild(parts: Config, change: str) -> None:
    law = Path(parts.data.dir) / "law"
    before = build_of(law)
    here(changed(parts, **CHANGES[change]))
    assert build_of(law) != before
    here(parts)
    assert build_of(law) == before


def test_changed_threshold_rebuilds_where_it_matters(two: Config) -> None:
    law = Path(two.data.dir) / "law"
    here(changed(two, dedup="near"))
    before = stamps(law)
    here(changed(two, dedup="near", dedup_threshold=0.7))
    assert not set(before) & set(stamps(law)) - {"meta.json"}
    here(changed(two, dedup="exact", dedup_threshold=0.8))
    before = stamps(law)
    here(changed(two, dedup="exact", dedup_threshold=0.7))
    assert stamps(law) == before


def test_changed_options_of_a_place_rebuild(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for options in ["?field=body", "?where=kind:a"]:
        with case(options):
            folder = next(fresh)
            rows = [
                {
                    "text": f"text {i} " * 9,
                    "body": f"body {i} " * 9,
                    "kind": "ab"[i % 2],
                    "split": split,
                }
                for split in SPLITS
                for i in range(6)
            ]
            (folder / "law.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            place = f"law={folder}/law.jsonl"
            here(make_config(folder, sources=(place,)))
            here(make_config(folder, sources=(place + options,)))
            wanted = [row for row in rows if row["split"] == "train"]
            field = "body" if "body" in options else "text"
            kinds = "a" if "kind" in options else "ab"
            expected = spell([row[field] for row in wanted if row["kind"] in kinds])
            assert read_tokens(folder / "data" / "law", "train") == expected


def test_older_build_is_there_until_the_new_one_is_whole(parts: Config, tmp_path: Path) -> None:
    before = contents(tmp_path / "data")
    source = tmp_path / "texts" / "law.jsonl"
    texts = split_texts(9, count=60)
    source.write_text(lines(texts) + "{\n")
    with pytest.raises(DemixError, match="broken JSON"):
        here(parts)
    after = contents(tmp_path / "data")
    assert {name: after[name] for name in before} == before
    stream = PreparedData(tmp_path / "data").tokens("law", "train")
    assert stream[:].tolist() == spell(split_texts(0, count=60)["train"])
    source.write_text(lines(texts))
    here(parts)
    assert read_tokens(tmp_path / "data" / "law", "train") == spell(texts["train"])


def test_what_an_earlier_version_prepared_is_replaced(two: Config, tmp_path: Path) -> None:
    whole = contents(tmp_path / "data")
    law = tmp_path / "data" / "law"
    shutil.rmtree(law)
    law.mkdir()
    for split in SPLITS:
        (law / f"{split}.tokens").write_bytes(b"old")
        (law / f"{split}.index.npy").write_bytes(b"old")
    (law / "meta.json").write_text('{"format": 1, "fingerprint": "-", "splits": {}}')
    here(two)
    assert contents(tmp_path / "data") == whole


def test_text_in_the_way_of_token_files_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for split in SPLITS:
        (folder / "law" / split).mkdir(parents=True)
        (folder / "law" / split / "a.txt").write_text(f"some text of {split}")
    before = contents(folder / "law")
    for source in (str(folder), f"law={folder}/law"):
        message = r"data/law/test is not prepared data.*--data_dir"
        with case(source), pytest.raises(DemixError, match=message):
            here(make_config(tmp_path, sources=(source,)))
        assert contents(folder / "law") == before


def test_folder_deleted_by_hand_takes_its_tokenizer_with_it(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", {split: ["a b c " * 10] for split in SPLITS})
    config = make_config(tmp_path, tokenizer=str(tmp_path / "words.json"))
    for words in ("abc", "cba"):
        write_words(tmp_path / "words.json", words)
        here(config)
        expected = [3, *[words.index(word) for word in "abc"] * 10, 3]
        assert read_tokens(tmp_path / "data" / "law", "train") == expected
        shutil.rmtree(tmp_path / "data")


def test_the_tokenizer_is_compared_by_its_content(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    write_domain(tmp_path / "texts", "law", split_texts(0))
    for name in ("words.json", "copy.json"):
        write_words(tmp_path / name, "abc")
    (tmp_path / "link.json").symlink_to("words.json")
    spellings = ["words.json", "./words.json", "~/words.json", f"file://{tmp_path}/words.json"]
    for typed in (*spellings, "link.json", "copy.json"):
        here(make_config(tmp_path, tokenizer=typed))
    write_words(tmp_path / "copy.json", "cba")
    with pytest.raises(DemixError, match="was prepared with tokenizer"):
        here(make_config(tmp_path, tokenizer="copy.json"))


def test_a_first_start_that_fails_may_be_corrected(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0))
    write_words(tmp_path / "words.json", "abc")
    with pytest.raises(DemixError, match="too small"):
        here(make_config(tmp_path, 10_000, tokenizer=str(tmp_path / "words.json")))
    here(make_config(tmp_path))
    assert PreparedData(tmp_path / "data").tokenizer.kind == "bytes"


def test_source_and_data_may_be_one_folder_and_no_text_becomes_its_own_source(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write_domain(tmp_path / "data", "law", split_texts(0))
    (tmp_path / "link").symlink_to("data")
    for source in (
        "data",
        "./data/",
        str(tmp_path / "data"),
        f"file://{tmp_path}/data",
        "link",
        "data,",
    ):
        assert list(here(make_config(tmp_path, sources=(source,)))) == ["law"], source
    for source in ("law=.", f"law={tmp_path}/link/../data", "law=file://link", "law=data/"):
        with pytest.raises(DemixError, match="would go to .*among the text of.*--data_dir"):
            here(make_config(tmp_path, sources=(source,)))


def test_domain_can_become_novel_without_rebuilding(two: Config, tmp_path: Path) -> None:
    before = stamps(tmp_path / "data")
    here(changed(two, novel_domains=("med",)))
    after = stamps(tmp_path / "data")
    assert {k: v for k, v in before.items() if k != "data.json"} == {
        k: v for k, v in after.items() if k != "data.json"
    }
    assert PreparedData(tmp_path / "data").novel == ("med",)


def test_config_read_back_prepares_the_same(two: Config) -> None:
    before = stamps(Path(two.data.dir))
    here(from_dict(json.loads(as_json(two))))
    assert stamps(Path(two.data.dir)) == before


PIECES = [f"{kind}-00002.{end}" for kind in ("train", "valid") for end in ("tokens", "index")]


@pytest.mark.slow
def test_part_with_a_damaged_file_is_made_again(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for name in [*PIECES, "00002.json"]:
        for damage in ["missing", "shorter", "longer", "empty"]:
            with case(name, damage):
                folder = next(fresh)
                texts = {split: [f"{split} {i} " * 9 for i in range(40)] for split in SPLITS}
                rows = [
                    row
                    for i in range(40)
                    for row in lines({s: [texts[s][i]] for s in SPLITS}).split("\n")
                ]
                (folder / "texts").mkdir()
                (folder / "texts" / "law.jsonl").write_text("\n".join(filter(None, rows)) + "\n")
                config = make_config(folder, part_bytes=1000)
                here(config)
                whole, before = contents(folder / "data"), stamps(folder / "data")
                path = build_of(folder / "data" / "law") / name
                content = path.read_bytes()
                assert content
                if damage == "missing":
                    path.unlink()
                else:
                    ends = {"shorter": content[:-9], "longer": content + b"x", "empty": b""}
                    path.write_bytes(ends[damage])
                here(config)
                assert contents(folder / "data") == whole
                after = stamps(folder / "data")
                redone = {name for name in before if after[name] != before[name]}
                assert redone - {"law/meta.json"} == set(parts_of(before, 2))


def test_lost_meta_is_made_again_from_the_parts(parts: Config, tmp_path: Path) -> None:
    whole, before = contents(tmp_path / "data"), stamps(tmp_path / "data")
    (tmp_path / "data" / "law" / "meta.json").unlink()
    here(parts)
    assert contents(tmp_path / "data") == whole
    after = stamps(tmp_path / "data")
    assert {name for name in before if after[name] != before[name]} == {"law/meta.json"}


def test_damaged_files_are_made_anew_or_named(parts: Config, tmp_path: Path) -> None:
    data = tmp_path / "data"
    before = contents(data)
    counts = f"{build_of(data / 'law').relative_to(data)}/00001.json"
    for name, damage, named in [
        ("data.json", b"{}", False),
        ("data.json", b'{"train": 3, "novel": []}', False),
        ("data.json", b"[]", True),
        ("law/meta.json", b"{}", False),
        ("law/meta.json", b'{"format": "2"}', False),
        ("law/meta.json", b"\xff", True),
        (counts, b"", False),
        (counts, b'{"train": {}}', False),
        ("tokenizer/tokenizer_meta.json", b"", True),
        ("tokenizer/tokenizer_meta.json", b"{}", True),
    ]:
        with case(f"{name} {damage!r}"):
            whole = (data / name).read_bytes()
            (data / name).write_bytes(damage)
            if named:
                with pytest.raises(DemixError, match=rf"{name} is damaged: .*; (delete|copy)"):
                    here(parts)
                (data / name).write_bytes(whole)
            else:
                here(parts)
            assert contents(data) == before


def test_damaged_description_says_what_to_delete(parts: Config, tmp_path: Path) -> None:
    for name in ["law/meta.json", "data.json"]:
        with case(name):
            path = tmp_path / "data" / name
            whole = path.read_bytes()
            path.write_bytes(whole[:-9])
            for use in (
                lambda: here(parts),
                lambda: PreparedData(tmp_path / "data").tokens("law", "train"),
            ):
                with pytest.raises(DemixError, match=rf"{name} is damaged.*delete it"):
                    use()
            path.unlink()
            here(parts)
            assert path.read_bytes() == whole


def read_all(config: Config) -> None:
    data = PreparedData(config.data.dir)
    for split in SPLITS:
        data.tokens("law", split)[:]
        data.index("law", split)


def test_altered_file_is_found_by_who_reads_it(parts: Config, tmp_path: Path) -> None:
    for name in ["train-00003.tokens", "train-00003.index"]:
        with case(name):
            whole = contents(tmp_path / "data")
            path = build_of(tmp_path / "data" / "law") / name
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
            here(parts)
            with pytest.raises(
                DemixError, match=rf"{name} was altered .* delete its folder and run"
            ):
                read_all(parts)
            shutil.rmtree(path.parent)
            here(parts)
            assert contents(tmp_path / "data") == whole
            read_all(parts)


def test_what_killed_processes_left_is_swept_away(parts: Config, tmp_path: Path) -> None:
    whole = contents(tmp_path / "data")
    law = tmp_path / "data" / "law"
    (law / "meta.json").unlink()
    left = [law / ".meta.json.0123", build_of(law) / ".train-00001.tokens.0123"]
    left += [build_of(law) / "00003.signatures", build_of(law) / "00004.error.json"]
    left += [law / "0123456789ab" / "train-00000.tokens"]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"junk")
    here(parts)
    assert contents(tmp_path / "data") == whole
    assert not (law / "0123456789ab").exists()


def test_half_made_tokenizer_is_swept_away(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0))
    (tmp_path / "data" / ".tokenizer.abc").mkdir(parents=True)
    (tmp_path / "data" / ".tokenizer.abc" / "sentencepiece.model").write_bytes(b"junk")
    here(make_config(tmp_path))
    assert sorted(os.listdir(tmp_path / "data")) == [".lock", "data.json", "law", "tokenizer"]


def write_many(tmp_path: Path, count: int = 4000) -> Config:
    """A domain in some 300 parts, and a small one."""
    write_domain(tmp_path / "texts", "law", split_texts(0))
    write_domain(tmp_path / "texts", "med", split_texts(1, count=count))
    return make_config(tmp_path, part_bytes=2000, dedup="exact")


def kill_when(config: Config, pattern: str, count: int) -> None:
    """Kills `demix prepare` and its workers when so many files have been made."""
    run = subprocess.Popen(
        [sys.executable, "-c", PREPARE, as_json(config), "2"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    try:
        while len(list(Path(config.data.dir).glob(pattern))) < count:
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        os.killpg(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["med/*/[0-9]*.signatures", "med/*/[0-9]????.json"])
def test_killed_run_goes_on_where_it_was(tmp_path: Path, pattern: str) -> None:
    config = write_many(tmp_path)
    kill_when(config, pattern, 20)
    assert not list((tmp_path / "data").glob("*/meta.json"))
    assert not (tmp_path / "data" / "data.json").exists()
    before = stamps(tmp_path / "data")
    numbers = [int(p.name[:5]) for p in (tmp_path / "data").glob("med/*/[0-9]????.json")]
    assert len(numbers) < 290
    prepare(config, workers=2)
    after = stamps(tmp_path / "data")
    kept = parts_of({n: s for n, s in before.items() if n.startswith("med")}, *numbers)
    assert {name: after[name] for name in kept} == kept
    assert bool(kept) == ("json" in pattern)
    here(changed(config, dir=str(tmp_path / "other")))
    assert contents(tmp_path / "data") == contents(tmp_path / "other")


def test_text_that_changes_between_two_readings_is_an_error(tmp_path: Path) -> None:
    """The first reading finds duplicates, the second writes the others."""
    write_domain(tmp_path / "texts", "law", split_texts(0, count=60))
    config = make_config(tmp_path, part_bytes=1000, dedup="exact")
    build = prepare_until(config, "drop.npy")
    mask = build / "00003.drop.npy"
    np.save(mask, np.load(mask)[:-1])
    with pytest.raises(DemixError, match="domain 'law': its text changed while it was prepared"):
        here(config)
    mask.write_bytes(mask.read_bytes()[:50])
    with pytest.raises(DemixError, match=r"domain 'law': \S*00003.drop.npy is damaged"):
        here(config)


def prepare_until(config: Config, ending: str) -> Path:
    """The folder of a build in which only files of one kind and the counts of duplicates are."""
    here(config)
    law = Path(config.data.dir) / "law"
    (law / "meta.json").unlink()
    for path in build_of(law).iterdir():
        if not path.name.endswith((ending, "duplicates.json")):
            path.unlink()
    return build_of(law)
