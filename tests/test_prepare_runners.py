"""Whoever does the work of `demix prepare`, and wherever it goes: the same files."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
import fsspec
import pytest
import tokenizers
import zstandard
from preparing import (
    as_json,
    contents,
    here,
    lines,
    make_config,
    spell,
    split_texts,
    write_domain,
)

from demix_jax.config.schema import Config
from demix_jax.data.dataset import PreparedData
from demix_jax.data.prepare.prepare import prepare
from demix_jax.data.sources.base import SPLITS
from demix_jax.errors import DemixError

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TWO_PROCESSES = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")
RUNNERS: dict[str, dict[str, Any]] = {
    "two workers": {"workers": 2},
    "Beam": {"runner": "DirectRunner"},
    "Beam on two processes": {"runner": "DirectRunner", "beam_options": TWO_PROCESSES},
}
KINDS = {"sentencepiece": "near", "bpe.json": "exact", "bytes": "none"}  # tokenizer and dedup
CONFIG = """
from demix_jax.config.schema import Config, DataConfig, ModelConfig

def get_config():
    return Config(data=DataConfig(tokenizer="bytes", part_bytes=1000), model=ModelConfig(context=8))
"""


def slowly(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def write_sources(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Domains of every layout; some of their documents are copies."""
    names = ("lines", "gzipped", "zipped", "files", "shards")
    texts = {name: split_texts(seed, count=60) for seed, name in enumerate(names)}
    for split in texts.values():
        split["train"][7:9] = [split["train"][3], split["test"][1]]
    write_domain(folder / "texts", "lines", texts["lines"])
    data = {name: lines(texts[name]).encode() for name in names}
    (folder / "texts" / "gzipped.jsonl.gz").write_bytes(gzip.compress(data["gzipped"]))
    compressed = zstandard.ZstdCompressor().compress(data["zipped"])
    (folder / "texts" / "zipped.jsonl.zst").write_bytes(compressed)
    for split in SPLITS:
        (folder / "texts" / "files" / split).mkdir(parents=True)
        for i, text in enumerate(texts["files"][split]):
            (folder / "texts" / "files" / split / f"{i:03d}.txt").write_text(text, newline="")
    (folder / "shards").mkdir()
    rows = data["shards"].splitlines(keepends=True)
    for i in range(5):
        piece = rows[i * len(rows) // 5 : (i + 1) * len(rows) // 5]
        (folder / "shards" / f"{i}-of-5.jsonl").write_bytes(b"".join(piece))
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator([text for split in texts["lines"].values() for text in split], 400)
    bpe.save(str(folder / "bpe.json"))
    return texts


def config_of(folder: Path, kind: str, out: Path | str) -> Config:
    return make_config(
        folder,
        sources=(str(folder / "texts"), f"shards={folder}/shards/*-of-5.jsonl"),
        tokenizer=str(folder / kind) if kind == "bpe.json" else kind,
        vocab_size=320,
        dedup=KINDS[kind],
        part_bytes=1500,
        dir=str(out),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    write_sources(folder)
    return folder


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, dict[str, bytes]]:
    """What one process writes, for every kind."""
    for kind in KINDS:
        here(config_of(folder, kind, folder / kind.partition(".")[0]))
    return {kind: contents(folder / kind.partition(".")[0]) for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "runner"),
    [
        ("bytes", "two workers"),
        ("sentencepiece", "Beam"),
        ("bpe.json", "two workers"),
        slowly("bpe.json", "Beam on two processes"),
    ],
)
def test_all_runners_write_the_same_files(
    folder: Path, alone: dict[str, dict[str, bytes]], tmp_path: Path, kind: str, runner: str
) -> None:
    prepare(config_of(folder, kind, tmp_path / "data"), **RUNNERS[runner])
    found = contents(tmp_path / "data")
    assert set(found) == set(alone[kind])
    assert [name for name in found if found[name] != alone[kind][name]] == []
    domains = {name.split("/")[0] for name in found if name.endswith("00001.json")}
    assert domains >= {"lines", "files", "shards"}  # in several parts


def test_what_they_write_is_the_text(folder: Path, alone: dict[str, dict[str, bytes]]) -> None:
    data = PreparedData(folder / "bytes")
    texts = {name: split_texts(seed, count=60) for seed, name in enumerate(data.train)}
    assert data.train == ("files", "gzipped", "lines", "zipped", "shards")
    order = ("lines", "gzipped", "zipped", "files", "shards")
    texts = {name: split_texts(seed, count=60) for seed, name in enumerate(order)}
    for name, splits in texts.items():
        splits["train"][7:9] = [splits["train"][3], splits["test"][1]]
        for split in SPLITS:
            assert data.tokens(name, split)[:].tolist() == spell(splits[split])


def test_memory_bucket_gets_the_same_files(
    folder: Path, alone: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    root = f"memory://{tmp_path.name}/data"
    config = config_of(folder, "bpe.json", root)
    system = fsspec.filesystem("memory")
    try:
        for _ in range(2):
            here(config)
            found = system.find(root, detail=True)
            names = {name.partition("/data/")[2]: name for name in found}
            assert {name: system.cat(names[name]) for name in names} == alone["bpe.json"]
            made = {name: info["created"] for name, info in found.items()}
        before = made
        here(config)
        after = {name: info["created"] for name, info in system.find(root, detail=True).items()}
        assert after == before
    finally:
        system.rm(f"/{tmp_path.name}", recursive=True)


SHARED = """
import os

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

class Shared(LocalFileSystem):
    '''A disk that behaves as a bucket: it remembers what a listing said.'''

    protocol = "shared"
    info = AbstractFileSystem.info
    exists = AbstractFileSystem.exists

    def __init__(self, **options):
        super().__init__(auto_mkdir=True, **options)

    @classmethod
    def _strip_protocol(cls, path):
        return LocalFileSystem._strip_protocol(str(path).replace("shared://", "", 1))

    def ls(self, path, detail=False, **options):
        path = self._strip_protocol(path)
        found = self.dircache.get(path)
        if found is None:
            entries = os.scandir(path) if os.path.isdir(path) else [path]
            found = [LocalFileSystem.info(self, entry) for entry in entries]
            self.dircache[path] = found
        return found if detail else [entry["name"] for entry in found]

fsspec.register_implementation("shared", Shared)
"""
PREPARE = """
import json, sys
from demix_jax.config.serialization import from_dict
from demix_jax.data.prepare.prepare import prepare
prepare(from_dict(json.loads(sys.argv[1])), workers=2)
"""


def test_workers_share_a_bucket_that_caches_listings(
    folder: Path, alone: dict[str, dict[str, bytes]], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SHARED)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    config = config_of(folder, "bpe.json", f"shared://{tmp_path}/data")
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", PREPARE, as_json(config)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert contents(tmp_path / "data") == alone["bpe.json"]


@pytest.mark.parametrize("runner", ["two workers", "Beam", slowly("Beam on two processes")])
def test_broken_line_is_the_same_error(tmp_path: Path, runner: str) -> None:
    for seed, name in enumerate(("law", "med")):
        write_domain(tmp_path / "texts", name, split_texts(seed, count=60))
    source = tmp_path / "texts" / "med.jsonl"
    good = source.read_text()
    source.write_text(good + "{\n")
    config = make_config(tmp_path, part_bytes=1000)
    with pytest.raises(DemixError) as caught:
        prepare(config, **RUNNERS[runner])
    with pytest.raises(DemixError) as expected:
        here(config)
    assert str(caught.value) == str(expected.value)
    assert str(expected.value).startswith(f"domain 'med': {source}:68: broken JSON: ")
    source.write_text(good)
    prepare(config, **RUNNERS[runner])
    texts = split_texts(1, count=60)["train"]
    assert PreparedData(tmp_path / "data").tokens("med", "train")[:].tolist() == spell(texts)
    assert not list((tmp_path / "data").rglob("*error*"))


def demix(tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Runs `demix prepare` on the texts of the folder."""
    (tmp_path / "config.py").write_text(CONFIG)
    given = [f"--config={tmp_path}/config.py", f"--config.data.sources={tmp_path}/texts"]
    return forks.demix("prepare", *given, *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--runner=local", "--workers=2"],
        ["--runner=DirectRunner"],
        slowly(["--runner=DirectRunner", f"--beam_options={','.join(TWO_PROCESSES)}"]),
    ],
)
def test_flags_choose_the_runner(tmp_path: Path, flags: list[str]) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0, count=60))
    done = demix(tmp_path, f"--data_dir={tmp_path}/data", *flags)
    assert done.returncode == 0, done.stderr
    assert f"prepared data: {tmp_path}/data" in done.stdout
    here(make_config(tmp_path, part_bytes=1000, dir=str(tmp_path / "other")))
    assert contents(tmp_path / "data") == contents(tmp_path / "other")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--runner=Direct"], "unknown runner 'Direct'; did you mean 'DirectRunner'?"),
        (["--beam_options=--region=r"], "--beam_options need a --runner of Apache Beam, not local"),
        (["--runner=DirectRunner"], "law.jsonl:68: broken JSON"),
        (["--workers=2"], "law.jsonl:68: broken JSON"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(
    tmp_path: Path, flags: list[str], message: str
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "law.jsonl").write_text(lines(split_texts(0, count=60)) + "{\n")
    done = demix(tmp_path, f"--data_dir={tmp_path}/data", *flags)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("demix ")]
    assert line.startswith("demix prepare: error: ")
    assert message in line


def test_flag_allows_broken_lines(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "law.jsonl").write_text(lines(split_texts(0, count=60)) + "{\n")
    done = demix(tmp_path, f"--data_dir={tmp_path}/data", "--skip_bad_lines=1", "--workers=1")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "data" / "law" / "meta.json").read_text())["broken"]
