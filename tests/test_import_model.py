"""Models of Hugging Face: what comes in computes the same and goes out again as it came."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import case, folders
from edits import files
from hf_folders import END, read_tensors, save, write_model, write_tokenizer
from test_families import GOLDEN, SHAPES, program
from test_transformer import sequences

from demix_jax.checkpoint.arrays import read_leaf, unflatten
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.errors import DemixError
from demix_jax.experts.verify import verify
from demix_jax.interop.export_model import export_model
from demix_jax.interop.families import tree_shapes
from demix_jax.interop.import_model import import_model
from demix_jax.model.params import join, param_shapes


def imported_tree(workdir: Path):
    """The full tree of a run's first expert, read array by array."""
    newest = load_run(workdir).latest()
    halves = param_shapes(newest.run.model, 1)
    items = (newest.item("shared"), newest.item(f"expert.{newest.experts[0]}"))
    trees = []
    for half, item in zip(halves, items, strict=True):
        names = {path.name for path in item.iterdir() if path.is_dir()}
        trees.append(unflatten(half, {name: read_leaf(item, name) for name in names}))
    return join(*trees)


@pytest.mark.parametrize("family", SHAPES)
def test_imported_models_compute_what_transformers_does(tmp_path, family):
    folder = write_model(tmp_path / "hf", family)
    workdir = import_model(folder, tmp_path / "run")
    run = load_run(workdir)
    found = program(SHAPES[family], imported_tree(workdir), sequences()[0])
    with np.load(GOLDEN) as golden:
        np.testing.assert_allclose(found, golden[family], rtol=0, atol=1e-4)
    assert (run.model.eod, run.model.vocab_size, run.config.variant) == (28, 29, "dense_balanced")
    out = export_model(workdir, tmp_path / "out")
    before, after = read_tensors(folder), read_tensors(out)
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    config, again = (json.loads((path / "config.json").read_text()) for path in (folder, out))
    assert again == config


def test_a_config_of_its_own_describes_the_same_model(tmp_path):
    for family in ("gpt2", "llama", "qwen3"):
        shape = SHAPES[family]
        with case(family):
            folder = write_model(tmp_path / f"{family}-hf", family)
            workdir = import_model(folder, tmp_path / family)
            shutil.rmtree(workdir / "huggingface")
            out = export_model(workdir, tmp_path / f"{family}-out")
            again = import_model(out, tmp_path / f"{family}-again")
            assert tree_shapes(load_run(again).model) == tree_shapes(shape)
            one, other = (load_run(path).latest().params_hash for path in (workdir, again))
            assert one == other


def test_halves_and_shards_come_in_and_go_out(tmp_path):
    for dtype in ("bfloat16", "float16"):
        with case(dtype):
            folder = write_model(tmp_path / dtype, "llama", dtype=dtype, shards=3)
            workdir = import_model(folder, tmp_path / f"{dtype}-run")
            out = export_model(workdir, tmp_path / f"{dtype}-out", dtype=dtype, shard_bytes=4000)
            assert len(list(out.glob("*.safetensors"))) > 2
            index = json.loads((out / "model.safetensors.index.json").read_text())
            before, after = read_tensors(folder), read_tensors(out)
            assert set(index["weight_map"]) == set(before)
            assert all(before[name].tobytes() == after[name].tobytes() for name in before)
            total = sum(x.nbytes for x in before.values())
            assert index["metadata"]["total_size"] == total


def test_names_without_prefix_buffers_and_tied_copies_are_known(tmp_path):
    folder = write_model(tmp_path / "hf", "gpt2", prefix="transformer.")
    arrays = read_tensors(folder)
    arrays["h.0.attn.bias"] = np.ones((1, 1, 12, 12), np.float32)
    arrays["lm_head.weight"] = arrays["wte.weight"]
    save(folder, arrays)
    one = load_run(import_model(folder, tmp_path / "one")).latest().params_hash
    whole = write_model(tmp_path / "whole", "gpt2")
    assert load_run(import_model(whole, tmp_path / "two")).latest().params_hash == one
    arrays["lm_head.weight"] = arrays["wte.weight"] + 1
    save(folder, arrays)
    with pytest.raises(DemixError, match=r"has lm_head.weight, which a gpt2 model .* has not"):
        import_model(folder, tmp_path / "three")


def test_experts_are_equal_and_take_no_room(tmp_path):
    folder = write_model(tmp_path / "hf", "qwen3")
    names = ("law", "med", "code")
    workdir = import_model(folder, tmp_path / "run", variant="demix", experts=names)
    newest = load_run(workdir).latest()
    assert newest.experts == newest.run.domains == names
    assert len({newest.manifest.expert_hash(name) for name in names}) == 1
    inodes: dict[str, set[int]] = {}
    for name, (inode, _) in files(workdir / "checkpoints" / "0").items():
        if name.startswith("expert."):
            inodes.setdefault(name.partition("/")[2], set()).add(inode)
    assert all(len(found) == 1 for found in inodes.values())
    verify(workdir)
    assert newest.manifest.provenance["law"].how == "imported"


def test_the_document_token_is_bos_eos_or_named(tmp_path):
    folder = write_model(tmp_path / "hf", "llama", config={"bos_token_id": None})
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    end = tokenizer["added_tokens"][0]
    tokenizer["added_tokens"] = [end | {"id": 27, "content": "<s>"}, end]
    del tokenizer["model"]["vocab"][chr(97 + 27)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    asked = {"": 28, "eos": 28, "<s>": 27, END: 28}
    for i, (token, expected) in enumerate(asked.items()):
        with case(token):
            workdir = import_model(folder, tmp_path / str(i), document_token=token)
            tokenizer = load_run(workdir).tokenizer
            assert tokenizer.eod == expected
            assert tokenizer.encode_batch(["ab<s>"])[0].tolist()[:2] == [0, 1]
    with pytest.raises(DemixError, match="has no bos_token_id; name the token"):
        import_model(folder, tmp_path / "bos", document_token="bos")
    with pytest.raises(DemixError, match="'a' cannot separate documents"):
        import_model(folder, tmp_path / "a", document_token="a")
    hashes = {load_run(tmp_path / str(i)).tokenizer.hash for i in (1, 2)}
    assert len(hashes) == 2
    out = export_model(tmp_path / "2", tmp_path / "out")
    generation = json.loads((out / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (27, 27)


def test_rows_beyond_the_ids_are_kept(tmp_path):
    folder = write_model(tmp_path / "hf", "qwen2")
    write_tokenizer(folder / "tokenizer.json", 20)
    workdir = import_model(folder, tmp_path / "run", document_token=END)
    model = load_run(workdir).model
    assert (model.vocab_size, model.text_ids, model.eod) == (29, 21, 20)
    found = read_tensors(export_model(workdir, tmp_path / "out"))
    assert found["model.embed_tokens.weight"].shape == (29, 16)


def _with_config(**values):
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return change


def _with_tensors(change):
    def changed(folder: Path) -> None:
        arrays = read_tensors(folder)
        change(arrays)
        save(folder, arrays)

    return changed


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 9)


def _shards_without_one(folder: Path) -> None:
    arrays = read_tensors(folder)
    (folder / "model.safetensors").unlink()
    save(folder, arrays, 3)
    (folder / "model-2-of-3.safetensors").unlink()


def _pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


NORM = "model.norm.weight"
BAD = {
    "another family": (
        _with_config(model_type="mamba"),
        "model_type 'mamba'; families that can be imported: gpt2, llama, qwen2, qwen3, olmo2",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json is missing"),
    "a field less": (_with_config(hidden_size=None), "has no 'hidden_size'"),
    "another activation": (_with_config(hidden_act="gelu"), "hidden_act='gelu'; a llama model"),
    "another rope": (_with_config(rope_parameters={"rope_type": "yarn"}), "rope_rule='yarn'"),
    "sliding layers": (_with_config(layer_types=["sliding_attention"]), "sliding_attention; only"),
    "quantized": (_with_config(quantization_config={"bits": 4}), "quantization_config="),
    "another width": (
        _with_config(intermediate_size=25),
        r"mlp.down_proj.weight is \(16, 24\), the config says \(16, 25\) \(leaf layers.ffn.down",
    ),
    "a layer more": (_with_config(num_hidden_layers=3), "lacks model.layers.2."),
    "an impossible shape": (_with_config(num_key_value_heads=3), "describes no model"),
    "a file cut short": (_cut, "cut short or is no safetensors file"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
    "a missing shard": (_shards_without_one, "has no model-2-of-3.safetensors, which"),
    "a missing tensor": (_with_tensors(lambda a: a.pop(NORM)), f"lacks {NORM}"),
    "an extra tensor": (
        _with_tensors(lambda a: a.update({"model.extra": a[NORM]})),
        "has model.extra, which a llama model of its config.json has not",
    ),
    "integers": (
        _with_tensors(lambda a: a.update({NORM: a[NORM].astype(np.int8)})),
        f"{NORM} of .* is I8; only float32",
    ),
    "pickles": (_pickles, "pytorch_model.bin: pickle files can run any code"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer.json; make one"),
    "ids beyond the table": (
        lambda f: write_tokenizer(f / "tokenizer.json", 29),
        "has ids up to 29, the token table of .* 29 rows",
    ),
}


def test_what_cannot_be_imported_is_named_and_leaves_nothing(tmp_path):
    fresh, good = folders(tmp_path), write_model(tmp_path / "good", "llama")
    for name, (spoil, message) in BAD.items():
        with case(name):
            root = next(fresh)
            shutil.copytree(good, root / "hf")
            spoil(root / "hf")
            with pytest.raises(DemixError, match=message) as error:
                import_model(root / "hf", root / "run", document_token=END)
            assert "\n" not in str(error.value)
            assert [path.name for path in root.iterdir()] == ["hf"]
    (tmp_path / "there").mkdir()
    for workdir, options, message in (
        (tmp_path / "there", {}, "there exists; choose another --workdir"),
        (tmp_path / "new", {"variant": "demix"}, "needs the names of its experts"),
        (tmp_path / "new", {"experts": ["law"]}, "dense has one feed-forward stack"),
        (tmp_path / "new", {"variant": "demix", "experts": ["a", "a"]}, "named 2 times"),
        (tmp_path / "new", {"context": 13}, "more than the model's 12"),
    ):
        with case(message), pytest.raises(DemixError, match=message):
            import_model(good, workdir, **options)
    with pytest.raises(DemixError, match="nothing is imported in part"):
        import_model(write_model(tmp_path / "gpt2", "gpt2"), tmp_path / "new", context=8)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(tmp_path):
    folder = write_model(tmp_path / "hf", "llama")
    run, new = import_model(folder, tmp_path / "run"), tmp_path / "new"
    for arguments, blocks in (
        (f"import --hf {folder} --workdir {new}", 3),
        (f"export --workdir {run} --out {new}", 8),
    ):
        with case(arguments):
            command = f"ulimit -f {blocks}; exec {sys.executable} -m demix_jax {arguments}"
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert "File too large" in done.stderr
            assert {path.name for path in tmp_path.iterdir()} == {"hf", "run"}
