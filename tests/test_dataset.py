"""PreparedData folders: what is read, and what is noticed of files that are not what they were."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
from cases import case, folders

from demix_jax.data.dataset import PreparedData
from demix_jax.data.loader import heldout_sequences
from demix_jax.errors import DemixError

TEXTS = ["abc", "defgh é", "ij"]


@pytest.fixture
def data(tmp_path: Path) -> PreparedData:
    """One domain whose test split is two parts with an empty one between."""
    parts = [tiny.spell(TEXTS[:2]), ([], []), tiny.spell(TEXTS[2:])]
    return PreparedData(tiny.write_streams(tmp_path / "data", {"law": {"test": parts}}))


def test_parts_are_one_stream(data: PreparedData) -> None:
    expected, _ = tiny.spell(TEXTS)
    stream = data.tokens("law", "test")
    assert len(stream) == len(expected)
    for start in range(len(expected) + 1):
        for stop in range(start, len(expected) + 1):
            assert stream[start:stop].tolist() == expected[start:stop]
    assert [stream[i] for i in range(len(expected))] == expected
    assert np.asarray(stream).tolist() == expected
    assert stream[5:10_000].tolist() == expected[5:]


def test_index_is_of_the_whole_stream(data: PreparedData) -> None:
    _, expected = tiny.spell(TEXTS)
    assert data.index("law", "test").tolist() == [list(row) for row in expected]


def test_split_without_documents_is_empty(data: PreparedData) -> None:
    assert len(data.tokens("law", "valid")) == 0
    assert data.tokens("law", "valid")[:].tolist() == []
    assert data.index("law", "valid").shape == (0, 2)


def test_token_file_of_another_size_is_an_error(data: PreparedData) -> None:
    for change in [-2, -1, 1, 2]:
        with case(change):
            path = data.folder / "law" / "build" / "test-00000.tokens"
            content = path.read_bytes()
            path.write_bytes((content + b"xx")[: len(content) + change])
            sizes = rf"{len(content) + change} bytes, expected {len(content)}"
            with pytest.raises(DemixError, match=rf"test-00000\.tokens has {sizes}.*demix prepare"):
                data.tokens("law", "test")
            path.write_bytes(content)


def test_missing_file_is_an_error(data: PreparedData) -> None:
    for name in ["test-00002.tokens", "00000.json", "test-00002.index"]:
        with case(name):
            path = data.folder / "law" / "build" / name
            content = path.read_bytes()
            path.unlink()
            with pytest.raises(DemixError, match=rf"{name} is missing; run `demix prepare`"):
                heldout_sequences(data, "law", "test", 8, 0, None)
            path.write_bytes(content)


def test_missing_meta_is_an_error(data: PreparedData) -> None:
    (data.folder / "law" / "meta.json").unlink()
    with pytest.raises(DemixError, match=r"law/meta\.json is missing; run `demix prepare`"):
        data.tokens("law", "test")


def test_altered_token_is_noticed_where_it_is_read(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for at in [0, 16_383, 16_384, 50_000, 59_999]:
        with case(at):
            folder = next(fresh)
            tokens = np.random.default_rng(0).integers(0, 256, 30_000)
            streams = {"law": {"train": [(tokens, [])]}}
            data = PreparedData(tiny.write_streams(folder / "data", streams))
            assert (data.tokens("law", "train")[:] == tokens).all()
            path = folder / "data" / "law" / "build" / "train-00000.tokens"
            content = bytearray(path.read_bytes())
            content[at] ^= 4
            path.write_bytes(content)
            stream = data.tokens("law", "train")
            block = at // 16_384 * 8192
            for start in range(0, 30_000, 1000):
                touched = start // 8192 * 8192 <= block < start + 1000
                if not touched:
                    assert (stream[start : start + 1000] == tokens[start : start + 1000]).all()
                    continue
                message = rf"train-00000\.tokens was altered after .* near byte {2 * block};"
                for _ in range(2):  # and again, when asked again
                    with pytest.raises(DemixError, match=message):
                        stream[start : start + 1000]


def test_data_of_an_earlier_version_are_to_be_prepared_again(data: PreparedData) -> None:
    path = data.folder / "law" / "meta.json"
    meta = json.loads(path.read_text())
    del meta["build"]
    path.write_text(json.dumps(meta))
    with pytest.raises(DemixError, match="earlier version; run `demix prepare` again"):
        data.tokens("law", "test")


def test_bucket_is_to_be_copied_first() -> None:
    with pytest.raises(DemixError, match="gs://b/data is not on this machine.* copy"):
        PreparedData("gs://b/data")


def test_unknown_domain_names_the_nearest(data: PreparedData) -> None:
    message = r"unknown domain 'lawn'; did you mean 'law'\? \(domains: law\)"
    with pytest.raises(DemixError, match=message):
        data.tokens("lawn", "train")


def test_domain_of_another_tokenizer_is_an_error(data: PreparedData) -> None:
    path = data.folder / "law" / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer": "0" * 16}))
    with pytest.raises(DemixError, match="was tokenized with 0000000000000000, not with"):
        data.tokens("law", "test")


def test_folder_without_data_says_what_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "holds no prepared data; run `demix prepare` .*, or name its folder with --data_dir$"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DemixError, match=rf"^{tmp_path}/none {message}"):
        PreparedData("none")
    with pytest.raises(DemixError, match=message):
        PreparedData(tmp_path / "nothing")
