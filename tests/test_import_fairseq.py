"""Checkpoints of the released code: shared and rank files, read without running what they say."""

import argparse
import math
import os
import pickle
import shutil
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cases import case, folders
from hf_folders import write_tokenizer
from test_families import program

from demix_jax.checkpoint.run_dir import load_run
from demix_jax.errors import DemixError
from demix_jax.generation.weights import Weights
from demix_jax.interop.import_fairseq import import_fairseq
from demix_jax.interop.torch_files import load_torch_file
from demix_jax.model.params import join

L, E, F, H, C, IDS = 2, 16, 24, 4, 12, 28
NAMES = ("law", "med")


class _Tensor:
    """Pickled as torch pickles a tensor: a call, and a storage by its key."""

    def __init__(self, array: np.ndarray, key: str):
        self.array, self.key = array, key

    def __reduce__(self):
        torch = sys.modules["torch._utils"]
        stride = tuple(step // self.array.itemsize for step in self.array.strides)
        kind = {"float32": "FloatStorage", "float16": "HalfStorage"}[self.array.dtype.name]
        storage = _Storage(kind, self.key, self.array.size)
        return torch._rebuild_tensor_v2, (storage, 0, self.array.shape, stride, False, None)


class _Storage:
    def __init__(self, kind: str, key: str, size: int):
        self.kind, self.key, self.size = kind, key, size


class _Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        if isinstance(value, _Storage):
            kind = getattr(sys.modules["torch"], value.kind)
            return "storage", kind, value.key, "cuda:0", value.size
        return None


@pytest.fixture
def torch_names(monkeypatch) -> None:
    """Names that pickles of torch have, for writing; there is no torch here."""
    for module, names in (
        ("torch", ("FloatStorage", "HalfStorage")),
        ("torch._utils", ("_rebuild_tensor_v2",)),
    ):
        made = types.ModuleType(module)
        for name in names:
            setattr(made, name, type(name, (), {"__module__": module, "__qualname__": name}))
        monkeypatch.setitem(sys.modules, module, made)


def write_torch(path: Path, values: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Writes {"model": arrays} and other values as `torch.save` does."""
    keys = {name: str(i) for i, name in enumerate(arrays)}
    model = OrderedDict((name, _Tensor(x, keys[name])) for name, x in arrays.items())
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("archive/data.pkl", "w") as file:
            _Pickler(file, protocol=2).dump(values | {"model": model})
        for name, x in arrays.items():
            archive.writestr(f"archive/data/{keys[name]}", x.tobytes(order="A"))


def parameters(seed: int = 0) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Random shared parameters, and those of each expert, under fairseq's names."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> np.ndarray:
        return (0.2 * rng.standard_normal(shape)).astype(np.float32)

    shared = {
        "decoder.embed_tokens.weight": draw(4 + IDS, E),
        "decoder.embed_positions.weight": draw(C + 2, E),
        "decoder.layer_norm.weight": 1 + draw(E),
        "decoder.layer_norm.bias": draw(E),
    }
    experts: list[dict[str, np.ndarray]] = [{} for _ in NAMES]
    for i in range(L):
        at = f"decoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shared[f"{at}self_attn.{name}.weight"] = draw(E, E)
            shared[f"{at}self_attn.{name}.bias"] = draw(E)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            shared[f"{at}{name}.weight"], shared[f"{at}{name}.bias"] = 1 + draw(E), draw(E)
        for expert in experts:
            expert[f"{at}fc1.weight"], expert[f"{at}fc1.bias"] = draw(F, E), draw(F)
            expert[f"{at}fc2.weight"], expert[f"{at}fc2.bias"] = draw(E, F), draw(E)
    return shared, experts


def write_checkpoint(folder: Path) -> Path:
    """Writes the files of a checkpoint whose dictionary has GPT-2's ids backwards."""
    folder.mkdir(parents=True)
    shared, experts = parameters()
    settings = argparse.Namespace(decoder_attention_heads=H, activation_fn="gelu")
    write_torch(folder / "last-shared.pt", {"args": settings, "epoch": 3}, shared)
    for rank, arrays in enumerate(experts):
        write_torch(folder / f"last-rank-{rank}.pt", {"args": settings}, arrays)
    lines = [f"{IDS - 1 - i} {100 - i}" for i in range(IDS)]
    (folder / "dict.txt").write_text("\n".join(lines) + "\n")
    write_tokenizer(folder / "tokenizer.json")
    return folder


def reference(shared, expert, ids: np.ndarray) -> np.ndarray:
    """Logits in float64 from the definition of fairseq's GPT-3 architecture."""
    p = {name: x.astype(np.float64) for name, x in (shared | expert).items()}

    def affine(x, name):
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
        return x * p[f"{name}.weight"] + p[f"{name}.bias"]

    table = p["decoder.embed_tokens.weight"]
    x = math.sqrt(E) * table[ids] + p["decoder.embed_positions.weight"][2 : 2 + len(ids)]
    for i in range(L):
        at = f"decoder.layers.{i}."
        y = norm(x, f"{at}self_attn_layer_norm")
        q, k, v = (
            affine(y, f"{at}self_attn.{n}_proj").reshape(len(ids), H, -1).swapaxes(0, 1)
            for n in "qkv"
        )
        scores = q @ k.swapaxes(1, 2) / math.sqrt(E // H)
        scores = np.where(np.tri(len(ids), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = (weights @ v).swapaxes(0, 1).reshape(len(ids), E)
        x = x + affine(mixed, f"{at}self_attn.out_proj")
        y = affine(norm(x, f"{at}final_layer_norm"), f"{at}fc1")
        y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
        x = x + affine(y, f"{at}fc2")
    return norm(x, "decoder.layer_norm") @ table.T


def test_an_imported_checkpoint_computes_what_fairseq_does(tmp_path, torch_names):
    folder = write_checkpoint(tmp_path / "released")
    workdir = import_fairseq(folder, tmp_path / "run", str(folder / "tokenizer.json"), NAMES)
    newest = load_run(workdir).latest()
    assert newest.experts == NAMES
    model = newest.run.model
    shared, trees = Weights(newest).load(NAMES)
    tokens = np.random.default_rng(1).integers(0, IDS, (2, C)).astype(np.int32)
    tokens[:, 0] = model.eod
    rows = np.array([*(4 + IDS - 1 - np.arange(IDS)), 2])  # of fairseq, by our ids
    theirs, experts = parameters()
    for tree, expert in zip(trees, experts, strict=True):
        found = program(model, jax.device_get(join(shared, tree)), tokens)
        for i in range(2):
            expected = reference(theirs, expert, rows[tokens[i]])[:, rows]
            np.testing.assert_allclose(found[i], expected, rtol=0, atol=1e-4)


def test_what_a_pickle_asks_for_is_not_done(tmp_path, torch_names):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/harm",)

    write_torch(tmp_path / "evil.pt", {"extra": Evil()}, parameters()[0])
    found = load_torch_file(tmp_path / "evil.pt")
    assert not (tmp_path / "harm").exists()
    assert found["model"]["decoder.layer_norm.bias"].shape == (E,)


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _write(path: Path, change) -> None:
    shared, experts = parameters()
    is_shared = "shared" in path.name
    arrays = shared if is_shared else experts[0]
    change(arrays)
    write_torch(path, {"args": {"decoder_attention_heads": H}}, arrays)


FC1_BIAS = "decoder.layers.1.fc1.bias"
SHARED, RANK = "last-shared.pt", "last-rank-0.pt"
BAD = {
    "no shared file": (lambda f: (f / SHARED).unlink(), "needs one file .*shared.pt, and has none"),
    "a rank less": (lambda f: (f / "last-rank-1.pt").unlink(), "has 1 rank files, --experts nam"),
    "a gap": (lambda f: (f / RANK).unlink(), r"lacks rank files of last: it has \[1\]"),
    "cut short": (lambda f: _cut(f / SHARED), "cut short, or was saved by PyTorch before 1.6"),
    "no dictionary": (lambda f: (f / "dict.txt").unlink(), "has no dict.txt"),
    "words": (lambda f: (f / "dict.txt").write_text("the 3\n"), "'the' is no token of GPT-2"),
    "more ids": (lambda f: (f / "dict.txt").write_text("99 3\n"), "has token 99, .* only 29 ids"),
    "a tensor less": (
        lambda f: _write(f / SHARED, lambda a: a.pop("decoder.layer_norm.bias")),
        "lacks decoder.layer_norm.bias; nothing was imported",
    ),
    "a gate": (
        lambda f: _write(f / RANK, lambda a: a.update({"decoder.layers.0.gate": np.ones(3, "f4")})),
        "has decoder.layers.0.gate, which this model has not",
    ),
    "another shape": (
        lambda f: _write(f / RANK, lambda a: a.update({FC1_BIAS: np.ones(3, "f4")})),
        r"decoder.layers.1.fc1.bias of law is \(3,\), expected 24 numbers",
    ),
}  # fmt: skip


def test_what_cannot_be_imported_is_named_and_leaves_nothing(tmp_path, torch_names):
    fresh, good = folders(tmp_path), write_checkpoint(tmp_path / "good")
    for name, (spoil, message) in BAD.items():
        with case(name):
            root = next(fresh)
            shutil.copytree(good, root / "in")
            spoil(root / "in")
            with pytest.raises(DemixError, match=message):
                import_fairseq(root / "in", root / "run", str(good / "tokenizer.json"), NAMES)
            assert [path.name for path in root.iterdir()] == ["in"]
