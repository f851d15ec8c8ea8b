"""A trunk trained on chosen domains, experts apart under it, and what a run says of their text."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import jax
import pytest
import tiny
from cases import case

from demix_jax.checkpoint.lineage import IMPORTED, Lineage, lineage_faults, text_of
from demix_jax.checkpoint.manifest import Manifest, Provenance
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.data.dataset import PreparedData
from demix_jax.data.prepare.prepare import prepare
from demix_jax.data.tokenizers import read_meta, save_tokenizer
from demix_jax.errors import DemixError
from demix_jax.experts.adapt import adapt
from demix_jax.experts.lifecycle import add_experts, merge_experts, remove_experts
from demix_jax.experts.settings import Settings
from demix_jax.experts.statement import list_experts
from demix_jax.experts.verify import verify
from demix_jax.training.clean_trunk import expert_config, trunk_config
from demix_jax.training.train import train

PUBLIC = ("news", "code")
ALL = ("law", "news", "med", "code")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return tiny.write_prepared(tmp_path_factory.mktemp("data") / "all", ALL, ("chat",))


def settings(data: Path, domains: tuple[str, ...] = ALL, **values):
    values = {"steps": 5, "branch_step": 2, "trunk_domains": PUBLIC, "batch_size": 8} | values
    config = tiny.config(data, **values)
    config.data.train_domains = domains
    return config


@pytest.fixture(scope="module")
def clean(data, tmp_path_factory) -> Path:
    """A run of all four domains over a trunk of two."""
    folder = tmp_path_factory.mktemp("clean") / "run"
    losses = train(settings(data), folder)
    assert set(losses) == set(ALL)
    return folder


def contents(workdir: Path) -> dict[str, str]:
    """SHA-256 of every file of every item of the newest step, but for the manifest."""
    folder = load_run(workdir).latest().folder
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for item in folder.glob("*")
        if item.is_dir() and item.name != "meta"
        for path in sorted(item.rglob("*"))
        if path.is_file() and path.name != "commit_success.txt"  # it has the time
    }


@pytest.mark.slow
def test_after_a_removal_the_run_is_one_that_never_had_the_domain(data, clean, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(clean, run)
    remove_experts(run, ["law"])
    assert "text of law: nothing that is left depends on it" in capsys.readouterr().out
    train(settings(data, ("news", "med", "code")), tmp_path / "never")
    one, other = (load_run(folder).latest().manifest for folder in (run, tmp_path / "never"))
    assert (one.experts, one.hashes, one.trunk_lineage) == (
        other.experts,
        other.hashes,
        other.trunk_lineage,
    )
    assert {"shared", "expert.med", "optimizer.med"} <= one.hashes.keys()
    assert contents(run) == contents(tmp_path / "never")
    lineages = [{n: made.lineage for n, made in m.provenance.items()} for m in (one, other)]
    assert lineages[0] == lineages[1]
    verify(run)
    assert "text of law: nothing that is left depends on it" in capsys.readouterr().out


@pytest.mark.slow
def test_the_run_says_whose_text_each_item_depends_on(data, clean):
    manifest = load_run(clean).latest().manifest
    hashes = {name: PreparedData(data).meta(name)["splits"]["train"]["sha256"] for name in ALL}
    public = {hashes[name]: name for name in PUBLIC}
    assert manifest.trunk_lineage == public
    for name in ALL:
        assert manifest.provenance[name].lineage == public | {hashes[name]: name}
        assert manifest.provenance[name].data == {name: hashes[name]}
    said = list_experts(clean)
    assert "the trunk depends on the text of: news, code" in said
    assert "removing one of these leaves nothing of its text: law, med\n" in said
    assert next(line for line in said.splitlines() if line.startswith("med")).count("trunk's + med")
    assert not (clean / "parts").exists()
    lines = [json.loads(line) for line in (clean / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert set(lines[-1]["validation"]) == set(ALL)
    verify(clean)


@pytest.mark.slow
def test_a_joint_training_is_said_to_depend_on_everything(data, tmp_path, capsys):
    for branch_step in (0, 1):
        run = tmp_path / str(branch_step)
        train(settings(data, steps=2, branch_step=branch_step, trunk_domains=()), run)
        manifest = load_run(run).latest().manifest
        everything = text_of(load_run(run).train_hashes)
        assert manifest.trunk_lineage == everything
        assert all(made.lineage == everything for made in manifest.provenance.values())
    assert "removing one of these leaves nothing of its text: none" in list_experts(run)
    capsys.readouterr()
    remove_experts(run, ["law"])
    left = "text of law: still in shared, expert.news, expert.med, expert.code"
    assert left in capsys.readouterr().out
    verify(run)
    assert left in capsys.readouterr().out


@pytest.mark.slow
def test_what_is_made_of_an_expert_depends_on_its_text(data, clean, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(clean, run)
    add_experts(run, ["copy"], ["law"])
    merge_experts(run, "mix", {"law": 0.5, "med": 0.5})
    adapt(run, ["chat"], tmp_path / "chat", Settings(steps=1, patience=0), parent="law")
    made = load_run(run).latest().manifest.provenance
    names = {name: set(one.lineage.values()) for name, one in made.items()}
    assert names["copy"] == {*PUBLIC, "law"}
    assert names["mix"] == {*PUBLIC, "law", "med"}
    assert names["chat"] == {*PUBLIC, "law", "chat"}
    receipt = remove_experts(run, ["law"], scan=False)
    assert [*receipt["text_left_in"]] == ["expert.copy", "expert.mix", "expert.chat"]


@pytest.mark.slow
def test_a_statement_that_cannot_be_true_is_found(clean, tmp_path):
    run, wrong = load_run(clean), load_run(clean).latest().manifest
    law = run.train_hashes["law"]
    history = dict(wrong.provenance)
    lied = dataclasses.replace(history["law"], lineage={})
    cases = (
        ({"trunk_lineage": {}}, "the trunk was trained on news, code, which"),
        ({"trunk_lineage": wrong.trunk_lineage | {law: "law"}}, "of the trunk has law, on which"),
        ({"provenance": history | {"law": lied}}, "'law': the trunk that it belongs to was"),
    )
    for values, message in cases:
        folder = tmp_path / str(len(message))
        shutil.copytree(clean, folder)
        path = folder / "checkpoints" / "5" / "meta" / "metadata"
        path.write_text(json.dumps(dataclasses.replace(wrong, **values).to_json()))
        with case(message), pytest.raises(DemixError, match=message):
            verify(folder)


def test_lineage_follows_training():
    start = Lineage({"a": "news"}, {"x": {"a": "news"}, "y": {"b": "law"}})
    text = {"x": {"c": "med"}, "y": {"d": "code"}}
    frozen = start.trained(text, frozen=True)
    assert frozen.trunk == {"a": "news"}
    assert frozen.experts["x"] == {"a": "news", "c": "med"}
    assert frozen.experts["y"] == {"a": "news", "b": "law", "d": "code"}
    joint = start.trained(text, frozen=False)
    assert joint.trunk == joint.experts["x"] == joint.experts["y"]
    assert set(joint.trunk) == {*"abcd"}
    unknown = Lineage(None, {"x": {}}).trained({"x": {"c": "med"}}, frozen=True)
    assert unknown == Lineage(None, {"x": None})
    one = Lineage({}, {"dense": {IMPORTED: IMPORTED}}).branched(["x", "y"])
    assert one.experts == {"x": {IMPORTED: IMPORTED}, "y": {IMPORTED: IMPORTED}}
    older = Manifest(experts=("x",), provenance={"x": Provenance(data={"law": "b"})})
    assert lineage_faults(older, {"a": "news"}) == []


@pytest.mark.slow
def test_a_training_that_was_stopped_goes_on_to_the_same_numbers(data, clean, tmp_path):
    parts, config = tmp_path / "run" / "parts", settings(data)
    train(trunk_config(config), parts / "trunk")
    train(expert_config(config, "law", parts / "trunk"), parts / "experts" / "law")
    seen: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: seen.append(name))
    train(expert_config(config, "med", parts / "trunk"), parts / "experts" / "med")
    assert seen
    assert not [name for name in seen if "compile" in name], "as law's program does for med"
    train(config, tmp_path / "run")
    assert contents(tmp_path / "run") == contents(clean)
    assert train(config, tmp_path / "run") == {}


def test_the_tokenizer_of_a_clean_trunk_has_seen_its_text_alone(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for name in ("news", "law"):
        texts = tiny.sentences(name, 300)
        lines = (json.dumps({"text": f"{i} {line}"}) for i, line in enumerate(texts))
        (text / f"{name}.jsonl").write_text("\n".join(lines))
    hashes = []
    for domains, trunk in ((("news", "law"), ("news",)), (("news",), ()), (("news", "law"), ())):
        data = tmp_path / f"{'-'.join(domains)}-{len(trunk)}"
        config = settings(data, domains, trunk_domains=trunk)
        config.data.sources, config.data.tokenizer = (str(text),), "sentencepiece"
        config.data.vocab_size = 310
        prepare(config, workers=1)
        hashes.append(PreparedData(data).tokenizer.hash)
    assert hashes[0] == hashes[1] != hashes[2]
    assert read_meta(tmp_path / "news-law-1" / "tokenizer")["trained_on"] == ["news"]
    assert read_meta(tmp_path / "news-law-0" / "tokenizer")["trained_on"] == ["news", "law"]
    copied = save_tokenizer(tmp_path / "news-law-1" / "tokenizer", tmp_path / "copy", {})
    assert (copied.hash, read_meta(tmp_path / "copy")["trained_on"]) == (hashes[0], ["news"])


def test_settings_that_make_no_clean_trunk_are_refused(data, tmp_path):
    cases = (
        (settings(data, branch_step=0), "needs train.branch_step"),
        (settings(data, branch_from="x"), "is a trunk of all domains"),
        (settings(data, trunk_domains=("new",)), "'new' is not a training domain"),
        (dataclasses.replace(settings(data), variant="dense"), "is for variant demix"),
    )
    for config, message in cases:
        with case(message), pytest.raises(DemixError, match=message):
            train(config, tmp_path / "run")
