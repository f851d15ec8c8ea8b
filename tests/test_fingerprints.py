"""Removed tensors are found wherever they lie, and nothing else is."""

import bz2
import gzip
import io
import json
import lzma
import os
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard

from demix_jax.errors import DemixError
from demix_jax.experts import fingerprints as scan_module
from demix_jax.experts.fingerprints import Fingerprints, Scan, fingerprint_files, scan

FLOATS = 50_000


def tensor(seed: int, size: int = FLOATS) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(size) * 0.02).astype("<f4")


EXPERT = tensor(1)
RAW = EXPERT.tobytes()
NOISE = np.random.default_rng(9).bytes(100_003)


@pytest.fixture
def prints(tmp_path: Path) -> Fingerprints:
    """Of the removed expert, whose file is outside the folder that is scanned."""
    path = tmp_path / "removed"
    path.write_bytes(RAW)
    (tmp_path / "folder").mkdir()
    return fingerprint_files("law", [path])


def scan_of(tmp_path: Path, prints: Fingerprints, content: bytes) -> Scan:
    (tmp_path / "folder" / "file").write_bytes(content)
    return scan(tmp_path / "folder", [prints])


def npz(**options: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, array in (("a.npy", tensor(2)), ("b.npy", EXPERT.reshape(100, -1))):
            member = io.BytesIO()
            np.save(member, array)
            archive.writestr(name, member.getvalue())
    return file.getvalue()


def safetensors() -> bytes:
    header = {"w": {"dtype": "F32", "shape": [FLOATS], "data_offsets": [0, 4 * FLOATS]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + RAW


def unsized_zstd() -> bytes:
    packer = zstandard.ZstdCompressor().compressobj()
    return packer.compress(RAW) + packer.flush()


WRAPPINGS: list[tuple[Callable[[], bytes], str]] = [
    (lambda: RAW, ""),
    (lambda: b"x" + RAW, ""),
    (lambda: b"xy" + RAW, ""),
    (lambda: NOISE + RAW + NOISE, ""),
    (safetensors, ""),
    (lambda: npz(compression=zipfile.ZIP_STORED), ""),
    (lambda: npz(compression=zipfile.ZIP_DEFLATED), "b.npy"),
    (lambda: NOISE + npz(compression=zipfile.ZIP_DEFLATED), "b.npy"),
    (lambda: gzip.compress(NOISE + RAW), "gzip"),
    (lambda: bz2.compress(RAW), "bz2"),
    (lambda: lzma.compress(RAW), "lzma"),
    (lambda: zstandard.compress(RAW), "zstd at 0"),
    (unsized_zstd, "zstd at 0"),
    (lambda: zstandard.compress(NOISE) + zstandard.compress(RAW), "zstd at"),
    (lambda: NOISE + zstandard.compress(RAW) + NOISE, f"zstd at {len(NOISE)}"),
]


def test_a_copy_is_found_in_any_wrapping(tmp_path: Path, prints: Fingerprints) -> None:
    for i, (make, inside) in enumerate(WRAPPINGS):
        result = scan_of(tmp_path, prints, make())
        assert [finding.name for finding in result.findings] == ["law"], f"wrapping {i}, {inside}"
        (finding,) = result.findings
        assert finding.path == tmp_path / "folder" / "file"
        assert finding.windows == len(prints.windows) == 8, f"wrapping {i}, {inside}"
        assert finding.inside.startswith(inside)
        assert bool(finding.inside) == bool(inside)
        assert result.unread == [], f"wrapping {i}, {inside}"


def test_the_offset_is_that_of_the_first_window(tmp_path: Path, prints: Fingerprints) -> None:
    alone, moved = (scan_of(tmp_path, prints, before + RAW).findings[0] for before in (b"", NOISE))
    assert 0 <= alone.offset < len(RAW) / 8
    assert moved.offset == alone.offset + len(NOISE)


def test_a_third_of_a_tensor_is_found(tmp_path: Path, prints: Fingerprints) -> None:
    third = len(RAW) // 3
    for begin in (0, third, 2 * third):
        (finding,) = scan_of(tmp_path, prints, b"abc" + RAW[begin : begin + third]).findings
        assert 1 <= finding.windows <= 4, begin


def test_copies_across_block_borders_are_found(
    tmp_path: Path, prints: Fingerprints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "CHUNK", 1000)
    for block in (64, 100, 4096, 65_537):
        monkeypatch.setattr(scan_module, "BLOCK", block)
        content = b"xyz" + RAW + zstandard.compress(NOISE)
        (finding,) = scan_of(tmp_path, prints, content).findings
        assert finding.windows == 8, block


def test_a_zstd_magic_across_a_block_border_is_found(
    tmp_path: Path, prints: Fingerprints, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shift in range(5):
        monkeypatch.setattr(scan_module, "BLOCK", len(NOISE) + shift)
        assert scan_of(tmp_path, prints, NOISE + zstandard.compress(RAW)).findings


def test_windows_are_as_dense_as_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(RAW)
    dense = fingerprint_files("law", [tmp_path / "file"], every=10_000)
    assert len(dense.windows) == len(RAW) // 10_000
    (tmp_path / "folder").mkdir()
    for begin in range(0, len(RAW) - 30_000, 17_001):
        assert scan_of(tmp_path, dense, RAW[begin : begin + 30_000]).findings


def test_small_and_sparse_files_have_windows(tmp_path: Path) -> None:
    sparse = np.zeros(500_000, "<f4")
    sparse[[*range(100_000, 100_040), *range(400_100, 400_140)]] = tensor(3, 80)
    contents = {"16": tensor(4, 16).tobytes(), "40": tensor(5, 40).tobytes(), "s": sparse.tobytes()}
    (tmp_path / "folder").mkdir()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        prints = fingerprint_files(name, [tmp_path / name])
        assert prints.blank == ()
        assert scan_of(tmp_path, prints, b"odd" + content).findings[0].windows >= 1


def test_what_others_have_in_the_same_place_is_no_evidence(tmp_path: Path) -> None:
    """All but eight floats are those of another file; moved elsewhere, they are evidence."""
    mine = EXPERT.copy()
    mine[30_000:30_008] = tensor(7, 8)
    for name, content in (("mine", mine), ("peer", EXPERT), ("moved", np.roll(EXPERT, 1))):
        (tmp_path / name).write_bytes(content.tobytes())
    (tmp_path / "folder").mkdir()
    for peers, windows, found in ((["peer"], 1, False), (["moved"], 8, True), ([], 8, True)):
        prints = fingerprint_files(
            "law", [tmp_path / "mine"], peers=lambda _, peers=peers: [tmp_path / p for p in peers]
        )
        assert len(prints.windows) == windows
        assert bool(scan_of(tmp_path, prints, RAW).findings) == found
        assert len(scan_of(tmp_path, prints, mine.tobytes()).findings) == 1


def test_files_without_evidence_are_named(tmp_path: Path) -> None:
    contents = {
        "zeros": bytes(300_000),
        "ones": np.ones(70_000, "<f4").tobytes(),
        "empty": b"",
        "short": RAW[:60],
        "text": json.dumps({"shape": [4, 5], "fill_value": 0.0, "sha": "0af3" * 99}).encode(),
        "weights": RAW,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    prints = fingerprint_files("law", [tmp_path / name for name in contents])
    assert prints.blank == tuple(str(tmp_path / name) for name in contents if name != "weights")
    assert prints.files == 6
    assert len(prints.windows) == 8


def test_a_clean_folder_is_clean(tmp_path: Path) -> None:
    metadata = json.dumps({"shape": [FLOATS], "data_type": "float32", "chunks": [FLOATS]})
    for name, seed in (("removed", 1), ("kept", 2)):
        item = tmp_path / name / "up.kernel"
        item.mkdir(parents=True)
        (item / "zarr.json").write_text(metadata)
        (item / "0.0").write_bytes(tensor(seed).tobytes())
        (item / "zeros").write_bytes(bytes(200_000))
        (item / "empty").write_bytes(b"")
    np.savez_compressed(tmp_path / "kept" / "x.npz", a=tensor(3), b=tensor(4))
    files = sorted(path for path in (tmp_path / "removed").rglob("*") if path.is_file())
    result = scan(tmp_path / "kept", [fingerprint_files("law", files)])
    assert result.findings == result.unread == []
    assert result.files == 5
    sizes = [path.stat().st_size for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert result.bytes == sum(sizes)


def test_a_tensor_one_ulp_away_is_another(tmp_path: Path, prints: Fingerprints) -> None:
    near = (EXPERT.view("<u4") ^ 1).tobytes()
    assert scan_of(tmp_path, prints, near).findings == []


def test_only_the_last_byte_of_a_window_differs(tmp_path: Path, prints: Fingerprints) -> None:
    changed = bytearray(RAW)
    changed[63::64] = bytes(byte ^ 1 for byte in changed[63::64])
    changed[31::64] = bytes(byte ^ 1 for byte in changed[31::64])
    assert scan_of(tmp_path, prints, bytes(changed)).findings == []


def test_several_prints_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    every = []
    for seed, name in ((1, "law"), (2, "med"), (3, "code")):
        (tmp_path / name).write_bytes(tensor(seed).tobytes())
        every.append(fingerprint_files(name, [tmp_path / name]))
    (tmp_path / "folder" / "both").write_bytes(tensor(3).tobytes() + tensor(1)[:20_000].tobytes())
    found = {(f.path.name, f.name): f.windows for f in scan(tmp_path / "folder", every).findings}
    assert found.keys() == {("both", "law"), ("both", "code")}
    assert found["both", "code"] == 8 > found["both", "law"] >= 2


def test_prints_survive_json(tmp_path: Path, prints: Fingerprints) -> None:
    again = Fingerprints.from_json(json.loads(json.dumps(prints.to_json())))
    assert again == prints
    assert scan_of(tmp_path, again, RAW).findings


def test_damaged_prints_are_refused(prints: Fingerprints) -> None:
    for damage in ({"scheme": 99}, {"windows": {"xy": 1}}, {"windows": {"ab": 1}}, {"windows": 3},
                   {"windows": {"ab" * 16: 1 << 32}}):  # fmt: skip
        with pytest.raises(DemixError, match="cannot be read"):
            Fingerprints.from_json(prints.to_json() | damage)


def test_prints_hold_no_weights(prints: Fingerprints) -> None:
    values = {*EXPERT.view("<u4").tolist(), *EXPERT.view(">u4").tolist()}
    keys = {key for key, _ in prints.windows}
    digests = b"".join(bytes.fromhex(mark) for _, mark in prints.windows)
    assert not keys & values
    assert not {int.from_bytes(digests[i : i + 4]) for i in range(len(digests) - 3)} & values
    assert prints.to_json().keys() == {"scheme", "name", "files", "blank", "windows"}


def test_a_false_zstd_magic_is_passed_over(tmp_path: Path, prints: Fingerprints) -> None:
    magic = b"\x28\xb5\x2f\xfd"
    for after in (b"", b"\x00", b"\xff" * 100, NOISE, bytes(100_000), RAW):
        result = scan_of(tmp_path, prints, NOISE + magic * 20 + after + zstandard.compress(RAW))
        assert [finding.windows for finding in result.findings] == [8], after[:2]
        assert result.unread == [], after[:2]


def damaged(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(50) + content[middle + 50 :]


def test_damage_is_reported(tmp_path: Path, prints: Fingerprints) -> None:
    for name, content in {
        "gzip cut": gzip.compress(RAW)[:-5000],
        "gzip": damaged(gzip.compress(RAW)),
        "zstd cut": zstandard.compress(RAW)[:-5000],
        "zstd inside cut": NOISE + zstandard.compress(RAW)[:-5000],
        "no zstd": b"\x28\xb5\x2f\xfd" + NOISE,
        "zip cut": npz(compression=zipfile.ZIP_DEFLATED)[:-5000],
        "zip": damaged(npz(compression=zipfile.ZIP_DEFLATED)),
        "xz cut": lzma.compress(RAW)[:-5000],
    }.items():
        problems = scan_of(tmp_path, prints, content).unread
        assert len(problems) == 1, name
        assert problems[0].startswith(str(tmp_path / "folder" / "file")), name


def test_what_comes_before_damage_is_searched(tmp_path: Path, prints: Fingerprints) -> None:
    for pack in (gzip.compress, zstandard.compress):
        packed = pack(RAW)
        result = scan_of(tmp_path, prints, packed[: len(packed) * 3 // 4])
        assert result.findings
        assert result.unread


def test_frames_are_reported_without_zstandard(
    tmp_path: Path, prints: Fingerprints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert scan_of(tmp_path, prints, RAW).unread == []
    (problem,) = scan_of(tmp_path, prints, NOISE + zstandard.compress(RAW)).unread
    assert "zstandard" in problem


def test_a_file_that_vanishes_is_reported(
    tmp_path: Path, prints: Fingerprints, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = os.walk

    def delete_after_listing(folder: Path, **options: Callable) -> object:
        for row in walk(folder, **options):
            (tmp_path / "folder" / "file").unlink()
            yield row

    monkeypatch.setattr(os, "walk", delete_after_listing)
    result = scan_of(tmp_path, prints, RAW)
    assert result.findings == []
    assert "No such file" in result.unread[0]


def test_links_are_not_followed(tmp_path: Path, prints: Fingerprints) -> None:
    (tmp_path / "folder" / "out").symlink_to(tmp_path / "removed")
    (tmp_path / "folder" / "up").symlink_to(tmp_path)
    (tmp_path / "folder" / "in").symlink_to(tmp_path / "folder" / "file")
    os.mkfifo(tmp_path / "folder" / "pipe")
    result = scan_of(tmp_path, prints, RAW)
    assert [finding.path.name for finding in result.findings] == ["file"]
    assert len(result.unread) == 3
    assert [Path(line.split(": ")[0]).name for line in result.unread] == ["up", "out", "pipe"]


def test_hard_links_are_each_reported(tmp_path: Path, prints: Fingerprints) -> None:
    os.link(tmp_path / "removed", tmp_path / "folder" / "again")
    assert [f.path.name for f in scan_of(tmp_path, prints, RAW).findings] == ["again", "file"]


def test_skipped_paths_are_left_out(tmp_path: Path, prints: Fingerprints) -> None:
    folder = tmp_path / "folder"
    for name in ("a/x", "b/x", "c"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(RAW)
    result = scan(folder, [prints], skip=[folder / "a", folder / "a" / ".." / "c"])
    assert [finding.path for finding in result.findings] == [folder / "b" / "x"]
    assert result.files == 1


def test_an_empty_search_is_refused(tmp_path: Path, prints: Fingerprints) -> None:
    (tmp_path / "zeros").write_bytes(bytes(1000))
    with pytest.raises(DemixError, match="no fingerprints"):
        scan(tmp_path, [fingerprint_files("law", [tmp_path / "zeros"])])
    with pytest.raises(DemixError, match="no such folder"):
        scan(tmp_path / "elsewhere", [prints])
