"""`demix experts`: what it does to the experts that are named, and nothing to any other."""

import json
import shutil
import struct
from pathlib import Path

import edits
import forks
import jax
import numpy as np
import pytest
import tiny

from demix_jax.checkpoint.checkpointer import Checkpointer
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.config.schema import Config
from demix_jax.errors import DemixError
from demix_jax.experts.lifecycle import (
    add_experts,
    export_experts,
    import_experts,
    merge_experts,
    remove_experts,
    rename_experts,
    uniform_weights,
)
from demix_jax.experts.safetensors_io import read_card
from demix_jax.experts.statement import list_experts
from demix_jax.experts.verify import verify
from demix_jax.training.train import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return edits.make_run(tmp_path_factory.mktemp("base") / "run")


@pytest.fixture
def run(base, tmp_path) -> Path:
    return shutil.copytree(base, tmp_path / "run")


def same_elsewhere(before: dict, after: dict, *names: str) -> bool:
    """Whether all files that are not of these experts are the same files with the same bytes."""
    dots = tuple(f".{name}/" for name in names)

    def others(found: dict) -> dict:
        skipped = ("meta/metadata", "_CHECKPOINT_METADATA")
        return {k: v for k, v in found.items() if k.startswith("checkpoints/")
                and not k.endswith(skipped) and not any(dot in k for dot in dots)}  # fmt: skip

    assert len(others(before)) > 50
    return others(before) == others(after)


def test_every_other_file_is_the_same_file(base, tmp_path):
    for i, (command, touched) in enumerate((
        (lambda w: add_experts(w, ["copy"], ["med"]), ["copy"]),
        (lambda w: add_experts(w, ["a", "b"], ["med", "law"]), ["a", "b"]),
        (lambda w: merge_experts(w, "mix", {"law": 0.5, "news": 0.5}), ["mix"]),
        (lambda w: remove_experts(w, ["med"]), ["med"]),
        (lambda w: remove_experts(w, ["law", "news"]), ["law", "news"]),
        (lambda w: rename_experts(w, {"med": "health"}), ["med", "health"]),
    )):  # fmt: skip
        run = shutil.copytree(base, tmp_path / str(i))
        before = edits.files(run)
        command(run)
        assert same_elsewhere(before, edits.files(run), *touched), touched
        verify(run)


def test_scores_of_all_other_experts_are_the_same_bits(run, tmp_path):
    """4 -> 5 -> 6 -> 5 -> 3 experts on 8 devices, so that the mesh is another one each time."""
    before = edits.scores(run)
    assert len({*before.values()}) == 4
    add_experts(run, ["copy"], ["med"])
    assert edits.scores(run) == before | {"copy": before["med"]}
    merge_experts(run, "mix", {"law": 0.5, "news": 0.5})
    found = edits.scores(run)
    mixed = found.pop("mix")
    assert found == before | {"copy": before["med"]}
    assert mixed not in found.values()
    remove_experts(run, ["copy"])
    rename_experts(run, {"med": "health"})
    found = edits.scores(run)
    renamed = {"health" if name == "med" else name: value for name, value in before.items()}
    assert found == renamed | {"mix": mixed}
    remove_experts(run, ["mix", "law"])
    del renamed["law"]
    assert edits.scores(run) == renamed


@pytest.mark.slow
def test_scores_are_the_same_bits_on_one_device(run):
    program = (
        "import sys, edits, jax; from pathlib import Path\n"
        "from demix_jax.experts.lifecycle import *\n"
        "assert len(jax.devices()) == 1\n"
        "run = Path(sys.argv[1])\n"
        "before = edits.scores(run)\n"
        "add_experts(run, ['copy'], ['law'])\n"
        "assert edits.scores(run) == before | {'copy': before['law']}\n"
        "remove_experts(run, ['copy', 'law'])\n"
        "assert edits.scores(run) == {n: v for n, v in before.items() if n != 'law'}\n"
        "print('same bits')\n"
    )
    found = forks.python(program, run, devices=1)
    assert "same bits" in found.stdout, found.stderr


def test_a_copy_has_its_optimizer_state_and_says_where_it_comes_from(run):
    add_experts(run, ["copy"], ["med"])
    meta, found = edits.meta_of(run), edits.restored(run)
    assert found.experts == (*edits.EXPERTS, "copy")
    for kind in ("expert", "optimizer"):
        assert meta["hashes"][f"{kind}.copy"] == meta["hashes"][f"{kind}.med"]
    made = meta["provenance"]["copy"]
    assert (made["how"], made["parent"], made["steps"]) == ("copied", "med", 6)
    assert made["data"] == meta["provenance"]["med"]["data"]
    for leaf in jax.tree.leaves((found.state.params.experts, found.state.opt_state.experts)):
        np.testing.assert_array_equal(leaf[4], leaf[1])


def test_a_merge_is_the_weighted_average_taken_in_float64(run):
    weights = {"law": 0.2, "code": 0.3, "news": 0.5}
    merge_experts(run, "mix", weights)
    for leaf in ("up.kernel", "up.bias", "down.kernel", "down.bias"):
        parts = [w * edits.array(run, f"expert.{n}", f"layers.ffn.{leaf}").astype(float)
                 for n, w in weights.items()]  # fmt: skip
        np.testing.assert_array_equal(
            edits.array(run, "expert.mix", f"layers.ffn.{leaf}"),
            np.sum(parts, 0).astype(np.float32),
        )
    made = edits.meta_of(run)["provenance"]["mix"]
    assert (made["how"], made["parent"]) == ("merged", weights)
    assert "optimizer.mix" not in edits.items(run)


def test_a_merge_of_one_expert_is_that_expert(run):
    merge_experts(run, "one", {"med": 1.0, "law": 0.0})
    hashes = edits.meta_of(run)["hashes"]
    assert hashes["expert.one"] == hashes["expert.med"]
    assert edits.contents(
        edits.step_of(run) / "expert.one" / "layers.ffn.up.kernel"
    ) == edits.contents(edits.step_of(run) / "expert.med" / "layers.ffn.up.kernel")


def test_uniform_weights_are_of_all_experts(run):
    assert uniform_weights(run) == dict.fromkeys(edits.EXPERTS, 0.25)


def test_export_remove_import_restores_every_bit(run, tmp_path):
    """One after the other, since each leaves the run as it was: first, middle, last and two."""
    before, state = edits.numbers(run), edits.restored(run).state
    for names in (["law"], ["med"], ["news"], ["med", "code"], ["news", "law"]):
        out = tmp_path / "-".join(names)
        export_experts(run, names, out)
        remove_experts(run, names)
        assert edits.restored(run).experts == tuple(n for n in edits.EXPERTS if n not in names)
        import_experts(run, [out / f"{name}.safetensors" for name in names])
        assert edits.numbers(run) == before, names
        found = edits.restored(run)
        assert found.experts == edits.EXPERTS
        jax.tree.map(np.testing.assert_array_equal, found.state, state)
    verify(run)


def test_the_best_parameters_so_far_go_with_their_expert(tmp_path):
    run = edits.make_run(tmp_path / "run", best=True)
    before = edits.numbers(run)
    assert "best.med" in edits.items(run)
    rename_experts(run, {"med": "health"})
    assert "best.health" in edits.items(run)
    rename_experts(run, {"health": "med"})
    export_experts(run, ["law"], tmp_path / "law.safetensors")
    remove_experts(run, ["law"])
    assert not {item for item in edits.items(run) if item.endswith(".law")}
    import_experts(run, [tmp_path / "law.safetensors"])
    numbers = edits.numbers(run)
    assert {k: v for k, v in numbers.items() if k != "meta/metadata"} == {
        k: v for k, v in before.items() if k != "meta/metadata"}  # fmt: skip
    assert edits.restored(run).best is not None


def test_an_expert_can_be_imported_under_another_name(run, tmp_path):
    export_experts(run, ["law"], tmp_path / "law.safetensors")
    import_experts(run, [tmp_path / "law.safetensors"], ["acts"])
    hashes = edits.meta_of(run)["hashes"]
    assert hashes["optimizer.acts"] == hashes["optimizer.law"]
    assert edits.restored(run).experts == (*edits.EXPERTS, "acts")


def test_an_expert_of_another_run_under_the_same_trunk_can_be_added(run, tmp_path):
    other = edits.make_run(tmp_path / "other", ("chat", "law"), seed=7)
    with pytest.raises(DemixError, match="several experts and none called 'talk': use .*:EXPERT"):
        add_experts(run, ["talk"], [str(other)])
    add_experts(run, ["talk", "chat"], [f"{other}:chat", str(other)])
    there, here = edits.meta_of(other)["hashes"], edits.meta_of(run)["hashes"]
    assert here["expert.talk"] == here["expert.chat"] == there["expert.chat"]
    assert edits.restored(run).experts == (*edits.EXPERTS, "talk", "chat")


def test_an_expert_is_meant_where_a_run_has_its_name(run, tmp_path, monkeypatch):
    edits.make_run(tmp_path / "law", ("chat",), seed=7)
    monkeypatch.chdir(tmp_path)
    add_experts(run, ["copy"], ["law"])
    hashes = edits.meta_of(run)["hashes"]
    assert hashes["expert.copy"] == hashes["expert.law"]


def test_the_table_says_where_every_expert_comes_from(run):
    add_experts(run, ["copy"], ["law"])
    merge_experts(run, "mix", {"law": 0.25, "med": 0.75})
    header, *rows = list_experts(run).splitlines()
    rows, said = rows[:6], rows[6:]
    assert said == [
        "the trunk depends on the text of: not recorded",
        "the tokenizer was trained on text of: none",
        "removing one of these leaves nothing of its text: none",
        "an expert owns ffn: its feed-forward blocks, as in the paper",
    ]
    assert [row.split()[0] for row in rows] == [*edits.EXPERTS, "copy", "mix"]
    law, copied, mixed = rows[0].split(), rows[4].split(), rows[5].split()
    assert law[1] == copied[1] == edits.meta_of(run)["hashes"]["expert.law"][:16]
    assert copied[2:4] == ["copied", "law"]
    assert mixed[2:4] == ["merged", "0.75*med+0.25*law"]
    assert law[5] == "2026-11-23"


def test_the_receipt_of_a_removal_lists_what_went_and_older_steps(tmp_path, capsys):
    run = edits.make_run(tmp_path / "run", steps=(2, 4, 6))
    rename_experts(run, {"med": "health"})
    receipt = remove_experts(run, ["health"])
    assert receipt["older_steps"] == [2, 4]  # there it is still called med
    assert "older steps still have them: 2, 4; --purge_history" in capsys.readouterr().out
    receipt = remove_experts(run, ["law"], purge_history=True)
    assert (receipt["older_steps"], receipt["purged_steps"]) == ([], [2, 4])
    assert Checkpointer(run).steps() == [6]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["6"]


@pytest.mark.parametrize("item", ["expert.med", "optimizer.med"])
def test_a_copy_of_a_removed_tensor_is_found_wherever_it_is(run, item):
    """Also by verify, later; a truncated and shifted copy of one array is enough."""
    leaf = "layers.ffn.up.kernel" if item.startswith("expert") else "1.0.nu.layers.ffn.down.kernel"
    stolen = edits.array(run, item, leaf).tobytes()[512:]
    (run / "notes.bin").write_bytes(b"abc" + stolen)
    with pytest.raises(DemixError, match=f"{item} in .*notes.bin"):
        remove_experts(run, ["med"])
    assert "med" not in edits.restored(run).experts
    with pytest.raises(DemixError, match=f"{item} in .*notes.bin"):
        verify(run)
    (run / "notes.bin").unlink()
    verify(run)
    (run / "late.bin").write_bytes(stolen)
    with pytest.raises(DemixError, match="late.bin"):
        verify(run)


def test_a_copy_can_be_removed_and_its_original_stays(run, capsys):
    add_experts(run, ["copy"], ["law"])
    remove_experts(run, ["copy"])
    assert "expert.copy is the same as expert.law, which stays" in capsys.readouterr().out
    verify(run)


def test_a_copy_that_stays_when_its_original_is_removed_is_told(run):
    add_experts(run, ["copy"], ["law"])
    with pytest.raises(DemixError, match="expert.law in item expert.copy of step 6"):
        remove_experts(run, ["law"])
    with pytest.raises(DemixError, match="expert.law in item expert.copy of step 6"):
        verify(run)
    remove_experts(run, ["copy"])
    verify(run)


def test_what_was_imported_again_is_not_searched_for_and_the_rest_is(run, tmp_path):
    export_experts(run, ["law", "med"], tmp_path)
    stolen = edits.array(run, "expert.med").tobytes()
    remove_experts(run, ["law", "med"])
    import_experts(run, [tmp_path / "law.safetensors"], ["acts"])
    verify(run)
    (run / "notes.bin").write_bytes(stolen)
    with pytest.raises(DemixError, match="expert.med in .*notes.bin"):
        verify(run)


@pytest.mark.slow
@pytest.mark.parametrize("item", ["expert.med", "optimizer.med"])
def test_a_damaged_expert_is_named_and_others_can_be_edited(base, tmp_path, item):
    for how in ("truncated", "altered", "without an array", "missing"):
        folder = tmp_path / how
        check_damaged(shutil.copytree(base, folder / "run"), folder, how, item)


def check_damaged(run: Path, tmp_path: Path, how: str, item: str) -> None:
    edits.damage(run, item, how)
    before = edits.files(run)
    for command in (
        lambda: verify(run),
        lambda: export_experts(run, ["med"], tmp_path / "out"),
        lambda: add_experts(run, ["copy"], ["med"]),
        lambda: edits.restored(run),
    ):
        with pytest.raises(DemixError, match=item) as error:
            command()
        assert "\n" not in str(error.value)
    if item == "expert.med":
        with pytest.raises(DemixError, match=item):
            merge_experts(run, "mix", {"law": 0.5, "med": 0.5})
    assert edits.files(run) == before
    assert not (tmp_path / "out").exists()
    remove_experts(run, ["news"])
    merge_experts(run, "mix", {"law": 0.5, "code": 0.5})
    remove_experts(run, ["med"])
    assert edits.restored(run).experts == ("law", "code", "mix")
    verify(run)


def test_bad_input_is_one_line_and_changes_nothing(run):
    before = edits.files(run)
    for command, message in (
        (lambda w: add_experts(w, ["med"], ["law"]), "there is an expert 'med' already"),
        (lambda w: add_experts(w, ["x", "x"], ["law", "med"]), "'x' already|named 2 times"),
        (lambda w: add_experts(w, ["x", "y"], ["law"]), "2 names .x,y. for 1 sources"),
        (lambda w: add_experts(w, ["x"], ["lwa"]), "no expert 'lwa'; did you mean 'law'"),
        (lambda w: add_experts(w, ["x"], ["no.safetensors"]), "no.safetensors does not exist"),
        (lambda w: add_experts(w, ["shared"], ["law"]), "'shared' is taken"),
        (lambda w: add_experts(w, ["dense"], ["law"]), "'dense' is taken"),
        (lambda w: add_experts(w, ["a/b"], ["law"]), "'a/b' does not fit a path"),
        (lambda w: add_experts(w, [""], ["law"]), "'' does not fit a path"),
        (lambda w: remove_experts(w, ["chat"]), "no expert 'chat'"),
        (lambda w: remove_experts(w, ["law", "law"]), "named 2 times"),
        (lambda w: remove_experts(w, list(edits.EXPERTS)), "no expert would be left"),
        (lambda w: rename_experts(w, {"law": "med"}), "there is an expert 'med' already"),
        (lambda w: rename_experts(w, {"law": "x", "med": "x"}), "named 2 times"),
        (lambda w: rename_experts(w, {"law": "shared"}), "'shared' is taken"),
        (lambda w: rename_experts(w, {"chat": "talk"}), "no expert 'chat'"),
        (lambda w: merge_experts(w, "law", {"med": 1.0}), "there is an expert 'law' already"),
        (lambda w: merge_experts(w, "x", {"law": 0.5}), "sum to 0.5"),
        (lambda w: merge_experts(w, "x", {"law": 2.0, "med": -1.0}), "must be in"),
        (lambda w: merge_experts(w, "x", {"law": float("nan"), "med": 0.5}), "sum to nan"),
        (lambda w: merge_experts(w, "x", {"law": 0.5, "lwa": 0.5}), "no expert 'lwa'"),
        (lambda w: export_experts(w, ["chat"], w / "out"), "no expert 'chat'"),
        (lambda w: export_experts(w, ["law", "law"], w / "out"), "named 2 times"),
        (lambda w: import_experts(w, [w / "run.json"]), "no safetensors file"),
    ):
        with pytest.raises(DemixError, match=message) as error:
            command(run)
        assert "\n" not in str(error.value)
        assert edits.files(run) == before, message


def rewrite(path: Path, change) -> None:
    """Changes the header of a safetensors file, by hand: 8 bytes of length, JSON, numbers."""
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    card = json.loads(header["__metadata__"]["demix_card"])
    change(header, card)
    header["__metadata__"]["demix_card"] = json.dumps(card)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def test_an_expert_of_another_trunk_tokenizer_or_shape_is_refused(run, tmp_path):
    """The message shows both sides; nothing is written."""
    other = edits.make_run(tmp_path / "other", ("chat",), trunk=5)
    before = edits.files(run)
    here, there = (edits.meta_of(w)["hashes"]["shared"] for w in (run, other))
    export_experts(other, ["chat"], tmp_path / "chat.safetensors")
    for command in (
        lambda: import_experts(run, [tmp_path / "chat.safetensors"]),
        lambda: add_experts(run, ["chat"], [str(other)]),
    ):
        with pytest.raises(DemixError, match=f"made for trunk {there}, .* has trunk {here}"):
            command()
    export_experts(run, ["law"], tmp_path / "law.safetensors")
    assert read_card(tmp_path / "law.safetensors").trunk == here

    def tokenizer(header: dict, card: dict) -> None:
        card["tokenizer"] = "feed"

    def shape(header: dict, card: dict) -> None:
        header["expert/layers.ffn.up.kernel"]["shape"] = [2, 64, 16]
        card["arrays"]["expert/layers.ffn.up.kernel"] = ["float32", [2, 64, 16]]

    def dtype(header: dict, card: dict) -> None:
        header["expert/layers.ffn.up.kernel"]["dtype"] = "I32"
        card["arrays"]["expert/layers.ffn.up.kernel"] = ["int32", [2, 16, 64]]

    token = load_run(run).tokenizer.hash
    for change, message in (
        (tokenizer, f"made for tokenizer feed, .* has tokenizer {token}"),
        (shape, r"up.kernel is float32 \(2, 64, 16\), this model needs float32 \(2, 16, 64\)"),
        (dtype, r"up.kernel is int32 \(2, 16, 64\), this model needs float32 \(2, 16, 64\)"),
    ):
        path = tmp_path / f"{change.__name__}.safetensors"
        shutil.copy(tmp_path / "law.safetensors", path)
        rewrite(path, change)
        with pytest.raises(DemixError, match=message):
            import_experts(run, [path], ["acts"])
    assert edits.files(run) == before


def test_when_the_second_of_two_files_does_not_fit_neither_is_imported(run, tmp_path):
    other = edits.make_run(tmp_path / "other", ("chat",), trunk=5)
    export_experts(other, ["chat"], tmp_path / "chat.safetensors")
    export_experts(run, ["law"], tmp_path / "law.safetensors")
    before = edits.files(run)
    with pytest.raises(DemixError, match="made for trunk"):
        import_experts(run, [tmp_path / f"{n}.safetensors" for n in ("law", "chat")], ["a", "b"])
    assert edits.files(run) == before


def order_seen(monkeypatch) -> list[dict[int, bytes]]:
    """Fills as training goes on: for each update, the tokens of each domain."""
    from demix_jax.training import input_pipeline

    seen, original = [], input_pipeline.prefetch_to_device

    def look(batches, put):
        for batch in original(batches, put):
            tokens = np.asarray(batch.tokens)  # [grad_accum_steps, D, B, T + 1]
            seen.append({d: tokens[:, d].tobytes() for d in range(tokens.shape[1])})
            yield batch

    monkeypatch.setattr(input_pipeline, "prefetch_to_device", look)
    return seen


@pytest.mark.slow
def test_training_goes_on_without_a_removed_expert_on_the_same_text(tmp_path, monkeypatch):
    data = tiny.write_prepared(tmp_path / "data", edits.EXPERTS)

    def config(steps: int) -> Config:
        return tiny.config(data, steps=steps, checkpoint_every=3, keep_checkpoints=2)

    seen = order_seen(monkeypatch)
    whole = tmp_path / "whole"
    train(config(6), whole)
    expected = list(seen)
    seen.clear()
    run = tmp_path / "cut"
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "6")
    remove_experts(run, ["med"])
    add_experts(run, ["copy"], ["law"])
    with pytest.raises(DemixError, match="experts that it was not trained with: copy; training"):
        train(config(6), run)
    remove_experts(run, ["copy"])
    before = edits.meta_of(run, 3)["hashes"]
    train(config(6), run)
    after = edits.meta_of(run, 6)
    assert after["experts"] == ["law", "code", "news"]
    assert after["hashes"]["expert.law"] != before["expert.law"]
    for old, new in zip(expected[3:], seen, strict=True):
        assert [old[0], old[2], old[3]] == [new[0], new[1], new[2]]
    add_experts(run, ["copy"], ["law"])
    assert train(config(6), run) == {}  # nothing is left to train, so nothing is in the way
