"""Files of strangers: what they claim is checked before memory is asked for, and nothing is run."""

import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import edits
import numpy as np
import pytest
import tiny
import zstandard
from forks import demix

from demix_jax.checkpoint.arrays import read_leaf, verify_item
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.config.serialization import read_saved, to_dict
from demix_jax.data.dataset import PreparedData
from demix_jax.data.sources.text_files import read_jsonl
from demix_jax.errors import DemixError, printable
from demix_jax.experts.lifecycle import import_experts, rename_experts
from demix_jax.experts.safetensors_io import read_card
from demix_jax.experts.statement import list_experts
from demix_jax.typed_files import read_array, read_arrays, read_json, unseal

EVIL = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\u2066\ud800"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return edits.make_run(tmp_path / "run", ("law", "med"))


def used_memory(program: str, *arguments: object) -> tuple[str, float]:
    """Output of a program that must end well, and by how many MiB its memory grew in the end."""
    head = (
        "import resource, sys\nfrom pathlib import Path\nfrom demix_jax.errors import DemixError\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", head + program, *map(str, arguments)],
        capture_output=True, text=True, check=True, timeout=100,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30)),
    )  # fmt: skip
    *lines, grown = done.stdout.splitlines()
    return "\n".join(lines), float(grown)


def rle_bomb(mib: int) -> bytes:
    """A zstd frame of zeros: blocks of four bytes, each of which becomes 128 KiB."""
    header = b"\x28\xb5\x2f\xfd\x00\x58"  # no checksum, window of 2 MiB
    size = 1 << 17
    block = struct.pack("<I", size << 3 | 1 << 1)[:3] + b"x"
    last = struct.pack("<I", size << 3 | 1 << 1 | 1)[:3] + b"x"
    return header + block * (8 * mib - 1) + last


def test_a_bomb_of_zstd_is_real() -> None:
    assert zstandard.ZstdDecompressor().decompressobj().decompress(rle_bomb(2)) == b"x" * (2 << 20)


@pytest.mark.slow
def test_compressed_lines_that_explode_end_early(tmp_path: Path) -> None:
    bomb = tmp_path / "lines.jsonl.zst"
    bomb.write_bytes(rle_bomb(40_000))  # 1.3 MB become 42 GB, in one line
    program = """
from demix_jax.data.sources.text_files import read_jsonl
before = peak()
try:
    list(read_jsonl(sys.argv[1]))
except DemixError as error:
    print(error)
print(peak() - before)
"""
    message, grown = used_memory(program, bomb)
    assert "lines.jsonl.zst has a document of over 134,217,728 bytes; cut it into" in message
    assert grown < 700


def test_arrays_that_claim_petabytes_are_refused_before_they_are_made(tmp_path: Path) -> None:
    def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
        file = io.BytesIO()
        values = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, values)
        return file.getvalue()

    npy, npz = tmp_path / "a.npy", tmp_path / "a.npz"
    for shape in ((1 << 48,), (1 << 31, 1 << 31), (1 << 30,), (-4, -4)):
        npy.write_bytes(header(shape) + bytes(64))
        with pytest.raises(DemixError, match=r"a\.npy is damaged: its header is of [\d,]+ bytes"):
            read_array(npy, "make it again")
        with zipfile.ZipFile(npz, "w", zipfile.ZIP_DEFLATED) as file:
            file.writestr("x.npy", header(shape) + bytes(64))
        with pytest.raises(DemixError, match=r"a\.npz is damaged: its header is of"):
            read_arrays(npz, "make it again")
    content = bytearray(npz.read_bytes())
    at = content.index(b"PK\1\2") + 24  # what a member unpacks to, in the list of members
    content[at : at + 4] = struct.pack("<I", 2 << 30)
    npz.write_bytes(content)
    with pytest.raises(DemixError, match="it unpacks to more than 1,073,741,824 bytes"):
        read_arrays(npz, "make it again")


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "was run"),)

    npy, npz = tmp_path / "a.npy", tmp_path / "a.npz"
    np.save(npy, np.array([Evil()]), allow_pickle=True)
    np.savez(npz, x=np.array([Evil()]), allow_pickle=True)
    raw = tmp_path / "raw.npy"
    raw.write_bytes(pickle.dumps(Evil()))
    for read, path in ((read_array, npy), (read_arrays, npz), (read_array, raw)):
        with pytest.raises(DemixError, match="damaged"):
            read(path, "make it again")
    for path in Path("demix_jax").rglob("*.py"):
        assert "pickle.load" not in path.read_text(), path
    assert not (tmp_path / "was run").exists()


def test_huge_and_deep_json_and_pipes_are_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with path.open("wb") as file:
        file.truncate(200 << 30)  # it takes no room
    with pytest.raises(DemixError, match=r"a\.json is damaged: it has more than 67,108,864 bytes"):
        read_json(path, dict[str, int], "-")
    path.write_text('{"a":' * 100_000)
    with pytest.raises(DemixError, match="nested too deeply"):
        read_json(path, dict[str, int], "-")
    path.unlink()
    os.mkfifo(path)  # reading it would wait for somebody who writes
    with pytest.raises(DemixError, match="it is a pipe or a device"):
        read_json(path, dict[str, int], "-")
    with pytest.raises(DemixError, match="it is a pipe or a device"):
        read_array(path, "-")
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"text": ' + "[" * 100_000 + "\n")
    with pytest.raises(DemixError, match=r"a\.jsonl:1: JSON that cannot be read"):
        list(read_jsonl(str(lines)))


def test_a_safetensors_file_that_claims_petabytes_is_refused(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    entry = {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}
    for header in (json.dumps({"expert/a": entry}).encode(), b"{", b"[" * 100_000):
        for length in (len(header), 1 << 50, 1 << 63):
            path.write_bytes(struct.pack("<Q", length) + header)
            with pytest.raises(DemixError, match=r"cannot read .*x\.safetensors: it was cut short"):
                read_card(path)
    before = edits.contents(run)
    with pytest.raises(DemixError, match="cut short"):
        import_experts(run, [path])
    assert edits.contents(run) == before


def test_items_of_other_shapes_are_refused_before_they_are_read(run: Path) -> None:
    item = edits.step_of(run) / "expert.law"
    layout = item / "layers.ffn.up.kernel" / ".zarray"
    values = json.loads(layout.read_text())
    expected = edits.meta_of(run)["hashes"]["expert.law"]
    huge, negative = [1 << 50, 2, 2], [-1, 2, 2]
    for shape, dtype in ((huge, "<f4"), (negative, "<f4"), (None, "|O"), (None, "<M8[s]")):
        new = values | {"shape": shape or values["shape"], "dtype": dtype}
        new["chunks"] = new["shape"]
        layout.write_text(json.dumps(new))
        with pytest.raises(DemixError, match="item 'expert.law'.*no array of numbers is"):
            verify_item(item, expected)
        with pytest.raises(DemixError, match="item 'expert.law'.*: it is .*, expected float32"):
            read_leaf(item, "layers.ffn.up.kernel", np.zeros((1, 2, 3), np.float32))


TRAVERSAL = ("../../outside", "/etc/outside", "..", "a/b", ".hidden", "a\\b", "")


@pytest.mark.parametrize("name", TRAVERSAL)
def test_names_that_lead_elsewhere_are_refused(name: str, run: Path) -> None:
    data = run.parent / "run-data"
    manifest = edits.step_of(run) / "meta" / "metadata"
    rename_experts(run, {"med": "acts"})
    (receipt,) = (run / "receipts").iterdir()
    before = edits.contents(run.parent)
    cases = {
        run / "run.json": lambda v: v | {"domains": [name], "text": {name: ""}},
        manifest: lambda v: v | {"folders": {"shared": name}},
        receipt: lambda v: v | {"renamed": {"med": name}, "state": "applied"},
        data / "data.json": lambda v: v | {"train": [name]},
        data / "law" / "meta.json": lambda v: v | {"build": name},
        run / "tokenizer" / "tokenizer_meta.json": lambda v: v | {"file": f"{name}.json"},
    }
    for path, change in cases.items():
        whole = path.read_text()
        path.write_text(json.dumps(change(unseal(json.loads(whole)))))
        of_data = path.is_relative_to(data)
        with pytest.raises(DemixError, match=path.name):
            PreparedData(data).meta("law") if of_data else rename_experts(run, {"law": "lex"})
        path.write_text(whole)
    assert edits.contents(run.parent) == before


def test_messages_and_tables_obey_no_control_characters(run: Path) -> None:
    assert printable("naïve 日本語\t\n") == "naïve 日本語\t\n"
    shown = str(DemixError(f"{EVIL}\n{EVIL}"))
    assert shown.isprintable()
    assert r"\x1b]0;owned\x07\x1b[2J\u202egnp.exe\u2066\ud800\n" in shown
    assert len(str(DemixError("x" * 10**7))) < 25_000
    manifest = edits.step_of(run) / "meta" / "metadata"
    values = unseal(json.loads(manifest.read_text()))
    values["provenance"]["law"] |= {"how": EVIL, "parent": EVIL}
    manifest.write_text(json.dumps(values))
    table = list_experts(run)
    assert r"\x1b]0;owned" in table
    assert all(line.isprintable() for line in table.splitlines())


@pytest.mark.slow
def test_a_saved_configuration_is_read_and_never_run(run: Path, tmp_path: Path) -> None:
    config = load_run(run).config
    assert read_saved(run / "run.json") == config
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps(to_dict(config)))
    assert read_saved(alone) == config
    for sources in (["law=seqio:os:task"], ["law=tfds:x?import=os"], ["law = seqio:os:task"]):
        alone.write_text(json.dumps({"data": {"sources": sources}}))
        with pytest.raises(DemixError, match="imports a module of Python, which a saved"):
            read_saved(alone)
    done = demix("config", "--config", run / "run.json", "--config.train.steps=31")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.count(" ") > 3]
    shown = {words[0]: words[2] for words in lines}
    assert (shown["train.steps"], shown["model.width"]) == ("31", "16")
    alone.write_text('{"train": {"stepz": 3}}')
    done = demix("config", "--config", alone)
    assert done.returncode == 2
    assert "unknown config key 'train.stepz'; did you mean 'train.steps'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_tokens_and_checksums_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    data = tiny.write_prepared(tmp_path / "data", ["law"])
    path = data / "law" / "build" / "00000.json"
    counts = json.loads(path.read_text())
    for crc32 in ([], [-1], [1 << 40], counts["train"]["crc32"] * 2):
        path.write_text(json.dumps(counts | {"train": counts["train"] | {"crc32": crc32}}))
        with pytest.raises(DemixError, match="has no checksums of its"):
            PreparedData(data).tokens("law", "train")
    stream, index = tiny.spell(["abc", "d"])
    stream[2] = 60_000  # of a vocabulary of 257
    data = tiny.write_streams(tmp_path / "more", {"law": {"train": [(stream, index)]}})
    with pytest.raises(DemixError, match="has token 60000, and the tokenizer 257 tokens"):
        np.asarray(PreparedData(data).tokens("law", "train"))
    stream, _ = tiny.spell(["abc", "d"])
    for wrong in ([(0, 3), (900, 1)], [(5, 3), (4, 1)], [(0, 3), (4, -1)], []):
        data = tiny.write_streams(tmp_path / str(wrong), {"law": {"train": [(stream, wrong)]}})
        with pytest.raises(DemixError, match="is of other tokens"):
            PreparedData(data).index("law", "train")
