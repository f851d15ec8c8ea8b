"""`demix prepare` that stops: full disks and broken lines, and what the next run makes of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from cases import case, folders
from preparing import (
    PREPARE,
    ROOT,
    as_json,
    changed,
    here,
    lines,
    make_config,
    parts_of,
    read_tokens,
    spell,
    split_texts,
    stamps,
    write_domain,
)

from demix_jax.config.schema import Config
from demix_jax.data.dataset import PreparedData
from demix_jax.data.prepare.prepare import LOCK
from demix_jax.data.sources.base import SPLITS, BadRecords
from demix_jax.data.sources.text_files import TextFiles
from demix_jax.errors import DemixError
from demix_jax.folder_lock import lock_folder


def limited(config: Config, size: int) -> subprocess.CompletedProcess[str]:
    """`demix prepare` where the system refuses files beyond a size."""
    limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n"
    command = [sys.executable, "-c", limit + PREPARE, as_json(config), "1"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_no_space_left_is_one_line_and_the_next_run_goes_on(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for dedup in ["none", "near"]:
        with case(dedup):
            folder = next(fresh)
            texts = split_texts(0) | {"train": [f"{i} short" for i in range(12)] + ["x " * 40_000]}
            write_domain(folder / "texts", "law", texts)
            texts = texts | {"train": [f"{i} {i} {i} {i} {i} {i}" for i in range(400)]}
            write_domain(folder / "texts", "med", texts)
            config = make_config(folder, part_bytes=3000, dedup=dedup)
            done = limited(config, 50_000)
            assert done.returncode == 1, done.stdout + done.stderr
            message = "DemixError: domain 'law': File too large while writing token files; what is"
            assert done.stderr.startswith(f"{message} finished")
            assert done.stderr.count("\n") == 1
            assert [path.name for path in (folder / "data").rglob(".*")] == [".lock"]
            assert not list((folder / "data").rglob("meta.json"))
            before = stamps(folder / "data")
            numbers = [
                int(path.name[:5]) for path in (folder / "data").glob("med/*/[0-9]????.json")
            ]
            here(config)
            after = stamps(folder / "data")
            kept = parts_of({n: s for n, s in before.items() if n.startswith("med")}, *numbers)
            assert {name: after[name] for name in kept} == kept
            data = PreparedData(folder / "data")
            for name in ("law", "med"):
                assert data.tokens(name, "test")[:].tolist() == spell(texts["test"])


def test_full_disk_is_one_line_and_the_next_run_goes_on(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0, count=3000))
    (tmp_path / "data").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(tmp_path / "data")]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount a small disk")
    try:
        config = make_config(tmp_path, part_bytes=20_000)
        with pytest.raises(DemixError, match=r"^domain 'law': No space left on device while wri"):
            here(config)
        before = stamps(tmp_path / "data")
        assert not [name for name in before if "/." in name]
        subprocess.run(["mount", "-o", "remount,size=8m", str(tmp_path / "data")], check=True)
        numbers = [int(path.name[:5]) for path in (tmp_path / "data").glob("law/*/[0-9]????.json")]
        here(config)
        kept, after = parts_of(before, *numbers), stamps(tmp_path / "data")
        assert kept
        assert {name: after[name] for name in kept} == kept
        expected = spell(split_texts(0, count=3000)["train"])
        assert PreparedData(tmp_path / "data").tokens("law", "train")[:].tolist() == expected
    finally:
        subprocess.run(["umount", "--lazy", str(tmp_path / "data")], check=True)


def test_broken_text_is_named_by_domain_file_and_line(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for tokenizer in ["bytes", "sentencepiece"]:
        with case(tokenizer):
            folder = next(fresh)
            write_domain(folder / "texts", "law", split_texts(0, count=100))
            with (folder / "texts" / "law.jsonl").open("a") as file:
                file.write("{\n")
            config = make_config(folder, tokenizer=tokenizer, vocab_size=300)
            with pytest.raises(DemixError, match=r"^domain 'law': /\S*law\.jsonl:108: broken JSON"):
                here(config)


def test_error_in_a_later_part_leaves_what_is_finished(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0, count=60))
    write_domain(tmp_path / "texts", "med", split_texts(1, count=60))
    source = tmp_path / "texts" / "med.jsonl"
    source.write_text(source.read_text() + "{\n")
    config = make_config(tmp_path, part_bytes=1000)
    with pytest.raises(DemixError, match=r"^domain 'med': /\S*med\.jsonl:68: broken JSON: [^\n]*$"):
        here(config)
    before = stamps(tmp_path / "data" / "law")
    assert before
    write_domain(tmp_path / "texts", "med", split_texts(1, count=60))
    here(config)
    after = stamps(tmp_path / "data" / "law")
    assert {name: after[name] for name in before} == before


def test_bad_lines_are_skipped_when_allowed(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0))
    with (tmp_path / "texts" / "law.jsonl").open("a") as file:
        file.write("{\n[]\n")
    here(make_config(tmp_path, skip_bad_lines=2))
    expected = spell(split_texts(0)["train"])
    assert read_tokens(tmp_path / "data" / "law", "train") == expected


def test_bad_lines_are_counted_over_all_parts(tmp_path: Path) -> None:
    texts = split_texts(0, count=60)
    (tmp_path / "texts").mkdir()
    good = lines(texts).splitlines(keepends=True)
    source = tmp_path / "texts" / "law.jsonl"
    source.write_text("".join(["[]\n", *good[:30], "{\n", *good[30:], "null\n"]))
    config = make_config(tmp_path, part_bytes=1000)
    message = r"^domain 'law': 3 broken lines, 2 were allowed; the last: \S*law.jsonl:70: expected"
    with pytest.raises(DemixError, match=message):
        here(changed(config, skip_bad_lines=2))
    assert not (tmp_path / "data" / "law" / "meta.json").exists()
    before = stamps(tmp_path / "data" / "law")
    metas = here(changed(config, skip_bad_lines=3))
    after = stamps(tmp_path / "data" / "law")
    assert {name: after[name] for name in before} == before  # nothing is done twice
    places = [place.split(":")[1] for place in metas["law"]["broken"]]
    assert places == ["1", "32", "70"]
    assert read_tokens(tmp_path / "data" / "law", "train") == spell(texts["train"])
    here(changed(config, skip_bad_lines=9))
    with pytest.raises(DemixError, match=message):
        here(changed(config, skip_bad_lines=2))


def test_file_written_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """What was read is not what the build is named after."""
    fresh = folders(tmp_path)
    for name in ["law.jsonl", "law.txt"]:
        for change in ["longer", "as long"]:
            with case(name, change):
                folder = next(fresh)
                path = folder / name
                path.write_text(lines(split_texts(0)))
                (part,) = TextFiles(str(path)).parts()
                assert list(part.documents(BadRecords()))
                path.write_text(path.read_text() + ("\n" if change == "longer" else ""))
                os.utime(path, (10**9, 10**9))
                with pytest.raises(
                    DemixError, match=rf"{name} was written while it was read; repeat"
                ):
                    list(part.documents(BadRecords()))
                (part,) = TextFiles(str(path)).parts()
                assert list(part.documents(BadRecords()))


def test_only_one_process_prepares_a_folder(tmp_path: Path) -> None:
    """The second names the first and leaves everything of it, a half-made tokenizer too."""
    write_domain(tmp_path / "texts", "law", split_texts(0))
    half = tmp_path / "data" / ".tokenizer.abc" / "sentencepiece.model"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    config = make_config(tmp_path)
    with lock_folder(tmp_path / "data", "prepare", LOCK):
        message = rf"is being changed by another process \(prepare, process {os.getpid()} on .*wait"
        with pytest.raises(DemixError, match=message):
            here(config)
        done = subprocess.run(
            [sys.executable, "-c", PREPARE, as_json(config), "1"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 1
        assert re.fullmatch(rf"DemixError: /.*{message}[^\n]*\n", done.stderr)
        assert half.read_bytes() == b"half"
    here(config)
    assert not half.exists()


def test_lock_of_a_process_that_is_gone_is_free(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / LOCK).touch()
    (tmp_path / "data" / f"{LOCK}.holder").write_text("prepare, process 1")
    here(make_config(tmp_path))
    assert not (tmp_path / "data" / f"{LOCK}.holder").exists()


def test_text_that_a_tokenizer_cannot_encode_is_named(tmp_path: Path) -> None:
    texts = {split: [f"{split} court zebra"] for split in SPLITS}
    write_domain(tmp_path / "texts", "law", texts)
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"court": 0}, "[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save(str(tmp_path / "words.json"))
    config = make_config(tmp_path, tokenizer=str(tmp_path / "words.json"))
    message = (
        r"^domain 'law': the tokenizer \S*tokenizer.json cannot encode the text that begins 'train "
        r"court zebra': WordLevel error: .*; use one that has .*, or data.tokenizer=bytes$"
    )
    with pytest.raises(DemixError, match=message):
        here(config)
    here(changed(config, tokenizer="bytes"))  # as it says; nothing was finished with the other
    expected = spell(texts["train"])
    assert PreparedData(tmp_path / "data").tokens("law", "train")[:].tolist() == expected
