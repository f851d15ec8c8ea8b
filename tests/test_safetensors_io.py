"""An expert as one file: bit for bit, readable without this package, and refused when it is not."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from demix_jax.checkpoint.arrays import write_item
from demix_jax.checkpoint.manifest import Provenance
from demix_jax.config.schema import OptimConfig
from demix_jax.errors import DemixError
from demix_jax.experts import safetensors_io
from demix_jax.experts.safetensors_io import (
    Card,
    check_part,
    describe,
    export_expert,
    map_part,
    read_card,
)
from demix_jax.model.optimizer import make_optimizer

WEIGHTS = {"down.kernel": (2, 6, 4), "up.bias": (2, 6), "up.kernel": (2, 4, 6)}


def random_tree(seed: int, width: int = 4) -> dict:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    return {
        "up": {"kernel": normal(2, width, 6), "bias": normal(2, 6)},
        "down": {"kernel": normal(2, 6, width)},
    }


def random_moments(seed: int) -> tuple:
    """An optax state: tuples, named tuples and integer scalars; mu is random, nu is all zeros."""
    state = make_optimizer(OptimConfig(), 10).init(random_tree(0))
    adam = state[1][0]._replace(count=jnp.int32(7), mu=random_tree(seed))
    return jax.device_get((state[0], (adam, *state[1][1:])))


def load_part(path: Path, card: Card, part: str, template):
    """Maps a part, and looks at its numbers."""
    tree = map_part(path, card, part, template)
    check_part(path, card, part, tree)
    return tree


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (one.shape, one.dtype, one.tobytes()) == (other.shape, other.dtype, other.tobytes())


class Source:
    """The items of one expert, written as a checkpoint does, and the card that goes with them."""

    def __init__(self, folder: Path, parts: dict):
        self.parts = {part: folder / f"{part}.law" for part in parts}
        hashes = {part: write_item(self.parts[part], tree) for part, tree in parts.items()}
        arrays = {}
        for part, tree in parts.items():
            arrays |= describe(part, tree)
        self.card = Card(
            name="law",
            experts=("med", "law"),
            arrays=arrays,
            hashes=hashes,
            trunk="ab" * 16,
            tokenizer="cd" * 32,
            model={"layers": 2, "width": 4},
            provenance=Provenance("trained", None, {"é": "\n"}, 7, "2026"),
            version="0.1.0",
        )


@pytest.fixture(scope="module")
def trees() -> dict:
    return {"expert": random_tree(1), "optimizer": random_moments(2)}


@pytest.fixture(scope="module")
def source(tmp_path_factory, trees) -> Source:
    return Source(tmp_path_factory.mktemp("items"), trees)


@pytest.fixture
def exported(tmp_path, source) -> Path:
    path = tmp_path / "law.safetensors"
    export_expert(path, source.card, source.parts)
    return path


def raw(path: Path) -> tuple[dict, bytes]:
    """Header and data, read by hand."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def rewrite(path: Path, *, card: dict | None = None, **arrays) -> None:
    """Replaces, adds or (None) drops arrays and fields of the card, with the library itself."""
    header, _ = raw(path)
    found = safetensors.numpy.load_file(path) | arrays
    text = json.dumps(json.loads(header["__metadata__"]["demix_card"]) | (card or {}))
    kept = {name: array for name, array in found.items() if array is not None}
    safetensors.numpy.save_file(kept, path, {"demix_card": text})


def test_the_library_reads_the_same_bits(exported, trees):
    found = safetensors.numpy.load_file(exported)
    expert, adam = trees["expert"], trees["optimizer"][1][0]
    assert_same(found["expert/up.kernel"], expert["up"]["kernel"])
    assert_same(found["optimizer/1.0.mu.down.kernel"], adam.mu["down"]["kernel"])
    assert_same(found["optimizer/1.0.nu.up.bias"], np.zeros((2, 6), np.float32))
    assert_same(found["optimizer/1.0.count"], np.int32(7))
    names = {f"{part}{name}" for name in WEIGHTS
             for part in ("expert/", "optimizer/1.0.mu.", "optimizer/1.0.nu.")}  # fmt: skip
    assert set(found) == names | {"optimizer/1.0.count", "optimizer/1.2.count"}


def test_a_header_read_by_hand_finds_the_same_bits(exported, trees):
    header, data = raw(exported)
    begin, end = header["expert/down.kernel"]["data_offsets"]
    assert header["expert/down.kernel"]["dtype"] == "F32"
    assert header["expert/down.kernel"]["shape"] == [2, 6, 4]
    assert data[begin:end] == trees["expert"]["down"]["kernel"].tobytes()
    assert max(v["data_offsets"][1] for k, v in header.items() if "/" in k) == len(data)


def test_the_card_is_in_the_file_and_beside_it(exported, source):
    text = exported.with_suffix(".json").read_text()
    assert raw(exported)[0]["__metadata__"] == {"demix_card": text}
    assert json.loads(text)["arrays"]["expert/up.bias"] == ["float32", [2, 6]]
    assert json.loads(text)["format"] == 2
    assert read_card(exported) == source.card


def test_everything_comes_back_bit_for_bit(exported, trees):
    card = read_card(exported)
    for part, tree in trees.items():
        assert_same(load_part(exported, card, part, shapes(tree)), tree)


def test_the_optimizer_is_optional(tmp_path, trees):
    source = Source(tmp_path, {"expert": trees["expert"]})
    path = tmp_path / "deep" / "er" / "law.safetensors"
    export_expert(path, source.card, source.parts)
    assert {name.partition("/")[0] for name in safetensors.numpy.load_file(path)} == {"expert"}
    with pytest.raises(DemixError, match="has no 'optimizer'; it has expert"):
        load_part(path, read_card(path), "optimizer", shapes(trees["optimizer"]))


def test_it_opens_without_this_package(exported):
    program = (
        "import sys, safetensors.numpy as s; print(s.load_file(sys.argv[1])"
        "['optimizer/1.0.count']); sys.exit('demix_jax' in sys.modules or 'jax' in sys.modules)"
    )
    command = [sys.executable, "-I", "-c", program, str(exported)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "7\n"


def test_others_may_read_the_file_as_they_may_its_card(exported):
    assert exported.stat().st_mode == exported.with_suffix(".json").stat().st_mode


def test_nothing_else_is_written(exported):
    assert sorted(p.name for p in exported.parent.iterdir()) == ["law.json", "law.safetensors"]


def test_every_flipped_byte_of_the_data_is_caught(exported, trees):
    content, card = bytearray(exported.read_bytes()), read_card(exported)
    for position in range(len(content) - len(raw(exported)[1]), len(content), 23):
        content[position] ^= 1
        exported.write_bytes(content)
        altered = 0
        for part, tree in trees.items():
            try:
                load_part(exported, card, part, shapes(tree))
            except DemixError as error:
                altered += "was altered" in str(error)
        assert altered == 1
        content[position] ^= 1


def test_a_truncated_file_is_refused(exported, source, trees):
    content = exported.read_bytes()
    for size in (0, 5, 8, 100, -1):
        exported.write_bytes(content[:size])
        with pytest.raises(DemixError, match="law.safetensors: it was cut short"):
            read_card(exported)
        with pytest.raises(DemixError, match="cut short"):
            load_part(exported, source.card, "expert", shapes(trees["expert"]))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(DemixError, match="x.safetensors does not exist"):
        read_card(path)
    with pytest.raises(DemixError, match="is not a file"):
        read_card(tmp_path)
    path.write_text("a text, long enough to look like a header")
    with pytest.raises(DemixError, match="no safetensors file"):
        read_card(path)
    for metadata in (None, {"format": "pt"}):
        safetensors.numpy.save_file({"a": np.zeros(2)}, path, metadata)
        with pytest.raises(DemixError, match="is not an exported expert"):
            read_card(path)


def test_a_card_that_is_not_valid_is_refused(exported):
    content = exported.read_bytes()
    for change, message in (
        ({"format": 1}, "format 1, this program reads 2"),
        ({"provenance": {"how": 3}}, "'provenance.how' is 3, not text"),
        ({"name": "../law"}, "does not fit a path"),
        ({"experts": "law"}, "'experts' is \"law\", not a list"),
        ({"experts": [1]}, "law.safetensors"),
        ({"model": None}, "'model' is null, not an object"),
        ({"arrays": ["up"]}, "law.safetensors"),
        ({"arrays": {"expert/up": "float32"}}, "law.safetensors"),
        ({"hashes": {"expert": "ab"}}, "not those of its parts"),
        ({"hashes": {}, "arrays": {}}, "not those of its parts"),
        ({"hashes": 3}, "law.safetensors"),
    ):
        rewrite(exported, card=change)
        with pytest.raises(
            DemixError, match="law.safetensors (is damaged: .*; get|has format)"
        ) as error:
            read_card(exported)
        assert message in str(error.value), change
        exported.write_bytes(content)


def test_a_card_needs_every_field(source):
    for name in json.loads(source.card.to_json()):
        values = json.loads(source.card.to_json())
        del values[name]
        with pytest.raises(DemixError, match=f"x.json is damaged: '{name}' is missing"):
            Card.from_json(json.dumps(values), Path("x.json"))
    for text in ("", "[]", "3", "null", '{"format": 2'):
        with pytest.raises(DemixError, match=r"x\.json"):
            Card.from_json(text, Path("x.json"))


def test_arrays_that_the_card_does_not_list_are_refused(exported):
    content = exported.read_bytes()
    for change in ({"expert/up.bias": None}, {"expert/gate": np.zeros(2)}):
        rewrite(exported, **change)
        with pytest.raises(DemixError, match="was altered: its arrays are not"):
            read_card(exported)
        exported.write_bytes(content)


def test_an_array_of_another_shape_than_the_card_says_is_refused(exported, source, trees):
    bias = trees["expert"]["up"]["bias"]
    rewrite(exported, **{"expert/up.bias": bias.reshape(6, 2)})
    with pytest.raises(DemixError, match="was altered: its arrays"):
        load_part(exported, source.card, "expert", shapes(trees["expert"]))
    rewrite(exported, **{"expert/up.bias": None})
    with pytest.raises(DemixError, match="was altered: its arrays"):
        load_part(exported, source.card, "expert", shapes(trees["expert"]))


def test_a_card_that_lies_about_shapes_is_refused(tmp_path, trees):
    source = Source(tmp_path, {"expert": {"a": np.zeros((2, 3), np.float32)}})
    path = tmp_path / "law.safetensors"
    export_expert(path, source.card, source.parts)
    lying = dataclasses.replace(source.card, arrays={"expert/a": ("float32", (3, 2))})
    with pytest.raises(DemixError, match="was altered"):
        load_part(path, lying, "expert", {"a": jax.ShapeDtypeStruct((3, 2), np.float32)})


def test_a_model_that_does_not_fit_is_told_both_sides(exported, trees):
    for (outer, inner, what), message in (
        (("up", "kernel", ((2, 8, 6), "float32")),
         "up.kernel is float32 (2, 4, 6), this model needs float32 (2, 8, 6)"),
        (("up", "bias", ((2, 6), "bfloat16")),
         "up.bias is float32 (2, 6), this model needs bfloat16 (2, 6)"),
        (("gate", "kernel", ((3,), "float32")),
         "gate.kernel is missing, this model needs float32 (3,)"),
        (("up", "bias", None), "up.bias is float32 (2, 6), this model needs no such array"),
    ):  # fmt: skip
        template = shapes(trees["expert"])
        template.setdefault(outer, {})[inner] = what and jax.ShapeDtypeStruct(
            what[0], jnp.dtype(what[1])
        )
        with pytest.raises(DemixError) as error:
            load_part(exported, read_card(exported), "expert", template)
        assert message in str(error.value)


def refused(path: Path, source: Source, match: str, **options) -> None:
    """Exporting fails with the message, and changes nothing below the folder of `path`."""
    before = {p: p.is_file() and p.read_bytes() for p in path.parent.rglob("*")}
    with pytest.raises(DemixError, match=match):
        export_expert(path, source.card, source.parts, **options)
    assert {p: p.is_file() and p.read_bytes() for p in path.parent.rglob("*")} == before


def test_a_damaged_item_is_not_exported(tmp_path, trees):
    source = Source(tmp_path / "items", trees)
    chunk = source.parts["optimizer"] / "1.0.mu.up.kernel" / "0.0.0"
    content = bytearray(chunk.read_bytes())
    content[9] ^= 1
    for damaged in (content, content[:-1]):
        chunk.write_bytes(damaged)
        refused(tmp_path / "law.safetensors", source, "optimizer.law")
    shutil.rmtree(chunk.parent)
    refused(tmp_path / "law.safetensors", source, "optimizer.law")


def test_an_item_that_changes_while_it_is_written_is_not_exported(tmp_path, trees, monkeypatch):
    source = Source(tmp_path / "items", trees)

    def late(arrays, *args, **kwargs):
        arrays["expert/up.bias"] = arrays["expert/up.bias"] + 1
        safetensors.numpy.save_file(arrays, *args, **kwargs)

    monkeypatch.setattr(safetensors_io, "save_file", late)
    refused(tmp_path / "law.safetensors", source, "its expert reads back differently")


def test_a_card_of_other_arrays_is_not_exported(tmp_path, source):
    card = dataclasses.replace(source.card, arrays={"expert/up.kernel": ("float32", (1,))})
    bias = {"expert/up.bias": ("float32", (6, 2))}  # as many bytes
    with pytest.raises(DemixError, match="do not hold the arrays its card lists"):
        export_expert(
            tmp_path / "law.safetensors",
            dataclasses.replace(source.card, arrays=source.card.arrays | bias),
            source.parts,
        )
    with pytest.raises(DemixError, match="do not hold the arrays its card lists"):
        export_expert(tmp_path / "law.safetensors", card, source.parts)
    with pytest.raises(DemixError, match="do not hold the arrays its card lists"):
        export_expert(tmp_path / "law.safetensors", source.card, {"expert": source.parts["expert"]})
    assert not list(tmp_path.iterdir())


def test_existing_files_are_kept_unless_told(tmp_path, source, exported):
    exported.write_text("mine")
    refused(exported, source, "law.safetensors exists")
    export_expert(exported, source.card, source.parts, overwrite=True)
    assert read_card(exported) == source.card
    exported.unlink()
    refused(exported, source, "law.json exists")
    (tmp_path / "x.safetensors").mkdir()
    refused(tmp_path / "x.safetensors", source, "exists", overwrite=True)
    refused(tmp_path / "law.bin", source, "ends in .safetensors")


def test_items_in_several_chunks_are_exported_too(tmp_path, trees):
    source = Source(tmp_path / "items", trees)
    folder = source.parts["expert"] / "up.kernel"  # as an array sharded over hosts is written
    spec = json.loads((folder / ".zarray").read_text())
    (folder / ".zarray").write_text(json.dumps(spec | {"chunks": [1, 4, 6]}))
    (folder / "0.0.0").unlink()
    for i, half in enumerate(trees["expert"]["up"]["kernel"]):
        (folder / f"{i}.0.0").write_bytes(half.tobytes())
    export_expert(tmp_path / "law.safetensors", source.card, source.parts)
    found = safetensors.numpy.load_file(tmp_path / "law.safetensors")["expert/up.kernel"]
    assert_same(found, trees["expert"]["up"]["kernel"])


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path, source):
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file" / "law.safetensors", source, "cannot write .*Not a directory")


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_behind(tmp_path, source):
    """The largest file a process may write stands for the disk; it would stay small."""
    (tmp_path / "job.py").write_text(
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from demix_jax.errors import DemixError\n"
        "from demix_jax.experts.safetensors_io import Card, export_expert\n"
        "items, out = map(Path, sys.argv[1:])\n"
        "card = Card.from_json((out / 'card').read_text(), out)\n"
        "for size in (0, 5000):\n"  # not even the card; the card, but not all of the arrays
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))\n"
        "    for path in (out / 'law.safetensors', out / 'a' / 'b' / 'law.safetensors'):\n"
        "        try:\n"
        "            export_expert(path, card, {p: items / f'{p}.law' for p in card.hashes})\n"
        "        except DemixError as error:\n"
        "            assert 'File too large' in str(error) and str(path) in str(error), error\n"
        "        else:\n"
        "            sys.exit('written')\n"
    )
    source = Source(tmp_path / "items", {"expert": random_tree(3, width=400)})
    (tmp_path / "card").write_text(source.card.to_json())
    command = [sys.executable, str(tmp_path / "job.py"), str(tmp_path / "items"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["card", "items", "job.py"]
