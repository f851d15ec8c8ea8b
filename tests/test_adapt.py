"""DEMix-DAPT: new experts under a frozen trunk; resuming, side by side, elsewhere, bad input."""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from forks import TENSORFLOW, demix
from test_early_stopping import validations
from test_train import metas

import demix_jax
from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.data.dataset import PreparedData
from demix_jax.errors import DemixError
from demix_jax.experts.adapt import Settings, adapt
from demix_jax.experts.lifecycle import export_experts, import_experts, remove_experts
from demix_jax.experts.materialize import materialize
from demix_jax.model.params import join
from demix_jax.model.transformer import token_logprobs
from demix_jax.training import trainer as loop_module
from demix_jax.training.train import train
from demix_jax.typed_files import unseal

pytestmark = pytest.mark.slow

DOMAINS, NOVEL = ("law", "med", "code"), ("chat", "news", "drift")
SETTINGS = Settings(steps=6, learning_rate=5e-3, validate_every=2, patience=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """`news` validates on 100 sequences of words of `med`, then on more of those of `law`.

    `drift` validates on words of `law` and trains on others, so that training makes it worse.
    """
    counts = {"train": 40, "valid": 4, "test": 5}
    streams = {
        name: {
            split: [tiny.spell(tiny.sentences("news" if name == "drift" else name, count, seed=i))]
            for i, (split, count) in enumerate(counts.items())
        }
        for name in DOMAINS + NOVEL
    }
    med, law = (" ".join(tiny.sentences(name, 200, seed=7)) for name in ("med", "law"))
    texts = {"news": [med[:1599], law[:4000]], "drift": [law[:300]]}  # 1600 tokens with <eod>
    for name, valid in texts.items():
        streams[name]["valid"] = [tiny.spell(valid)]
    folder = tiny.write_streams(tmp_path_factory.mktemp("data"), streams)
    (folder / "data.json").write_text(json.dumps({"train": DOMAINS, "novel": NOVEL}))
    return folder


def base_run(data: Path, workdir: Path, variant: str) -> Path:
    config = tiny.config(data, variant, steps=60, checkpoint_every=60, log_every=60)
    config.data.novel_domains = NOVEL
    train(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def base(data, tmp_path_factory) -> Path:
    return base_run(data, tmp_path_factory.mktemp("base"), "demix")


@pytest.fixture(scope="module")
def dense(data, tmp_path_factory) -> Path:
    return base_run(data, tmp_path_factory.mktemp("dense"), "dense_balanced")


@pytest.fixture
def run(base, tmp_path) -> Path:
    """A demix run to change: it has files of its own."""
    return Path(shutil.copytree(base, tmp_path / "run"))


def files(folder: Path) -> dict[str, tuple[int, str]]:
    """Inode and SHA-256 of every file below."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): (
            path.stat().st_ino,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in found
    }


def newest_meta(workdir: Path) -> dict:
    found = metas(workdir)
    return found[max(found)]


def best(workdir: Path) -> tuple[list[float], list[int]]:
    losses, steps, _, _ = newest_meta(workdir)["best"]
    return losses, steps


def stopped_at(step: int, monkeypatch, adapting: Callable[[], object]) -> None:
    """Adapts as a process would that dies after saving `step`; 0: before the first update."""

    def save_then_die(loop) -> None:
        original(loop)
        if loop.step == step:
            raise KeyboardInterrupt

    name = "_save" if step else "_update"
    original = (lambda loop: None) if not step else loop_module.Trainer._save
    monkeypatch.setattr(loop_module.Trainer, name, save_then_die)
    with pytest.raises(KeyboardInterrupt):
        adapting()
    monkeypatch.undo()


# One adaptation, looked at from all sides.


@dataclasses.dataclass
class Adapted:
    run: Path
    out: Path
    before: dict[str, tuple[int, str]]
    losses: dict[str, float]


@pytest.fixture(scope="module")
def adapted(base, data, tmp_path_factory) -> Adapted:
    """`chat` from `law`, in place."""
    folder = tmp_path_factory.mktemp("adapted")
    run = Path(shutil.copytree(base, folder / "run"))
    before = files(run / "checkpoints")
    losses = adapt(run, ("chat",), folder / "out", SETTINGS, parent="law")
    return Adapted(run, folder / "out", before, losses)


def test_the_expert_is_added_under_its_name(adapted):
    meta, made = newest_meta(adapted.run), newest_meta(adapted.out)
    assert meta["experts"] == [*DOMAINS, "chat"]
    assert meta["hashes"]["expert.chat"] == made["hashes"]["expert.chat"]
    assert meta["hashes"]["expert.chat"] != meta["hashes"]["expert.law"]
    provenance = meta["provenance"]["chat"]
    assert (provenance["how"], provenance["parent"]) == ("adapted", "law")
    assert provenance["data"] == {"chat": load_run(adapted.out).train_hashes["chat"]}


def test_trunk_and_other_experts_are_the_same_files(adapted):
    after = files(adapted.run / "checkpoints")
    changed = {name for name, value in after.items() if adapted.before.get(name) != value}
    assert adapted.before.keys() <= after.keys()
    allowed = ("60/meta/", "60/expert.chat/", "60/_CHECKPOINT_METADATA")
    assert {name for name in changed if not name.startswith(allowed)} == set()
    hashes = newest_meta(adapted.run)["hashes"]
    assert newest_meta(adapted.out)["hashes"]["shared"] == hashes["shared"]


def test_the_trunk_is_kept_once_and_never_with_optimizer_state(adapted):
    items = {path.name for path in (adapted.out / "checkpoints").glob("*/*") if path.is_dir()}
    assert items == {"expert.chat", "optimizer.chat", "data", "meta"}
    source = adapted.run / "checkpoints" / "60" / "shared"
    assert files(adapted.out / "frozen" / "shared") == files(source), "hard links"


def test_the_result_is_the_lowest_validation_loss(adapted):
    seen = validations(adapted.out)
    assert list(seen) == [0, 2, 4, 6]
    assert adapted.losses["chat"] == pytest.approx(min(seen.values()), abs=1e-6)
    assert adapted.losses["chat"] < seen[0] - 0.01
    lowest = min(seen, key=seen.get)
    assert newest_meta(adapted.run)["provenance"]["chat"]["steps"] == lowest


def test_a_finished_adaptation_is_left_alone(adapted, capsys):
    before = files(adapted.out / "checkpoints"), files(adapted.run / "checkpoints")
    assert adapt(adapted.run, ("chat",), adapted.out, SETTINGS, parent="law") == {}
    model = demix_jax.load(adapted.run).adapt("chat", adapted.out, SETTINGS, parent="law")
    assert model.experts == (*DOMAINS, "chat")
    assert (files(adapted.out / "checkpoints"), files(adapted.run / "checkpoints")) == before
    assert f"{adapted.run} has chat of {adapted.out} already" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("stop", [0, 4, 6])
def test_resuming_changes_nothing(adapted, base, run, tmp_path, monkeypatch, stop):
    """Killed before the first step, between validations, and before the expert was added."""

    def adapting() -> dict:
        return adapt(run, ("chat",), tmp_path / "out", SETTINGS, parent="law")

    stopped_at(stop, monkeypatch, adapting)
    assert newest_meta(run)["experts"] == list(DOMAINS)
    if 0 < stop < 6:
        hashes = newest_meta(tmp_path / "out")["hashes"]
        assert hashes.keys() == {"shared", "expert.chat", "optimizer.chat", "best.chat"}
        assert not (tmp_path / "out" / "checkpoints" / str(stop) / "shared").exists()
    adapting()
    for folder, whole in ((tmp_path / "out", adapted.out), (run, adapted.run)):
        assert newest_meta(folder)["hashes"] == newest_meta(whole)["hashes"]
    assert validations(tmp_path / "out") == validations(adapted.out)


@pytest.mark.slow
def test_only_trunk_and_parent_are_needed(adapted, run, tmp_path):
    """The other experts and every optimizer state are gone, yet the same expert comes out."""
    for item in (run / "checkpoints" / "60").iterdir():
        if item.is_dir() and item.name not in ("shared", "expert.law", "data", "meta"):
            shutil.rmtree(item)
    adapt(run, ("chat",), tmp_path / "out", SETTINGS, parent="law", add=False)
    hashes = [newest_meta(out)["hashes"] for out in (tmp_path / "out", adapted.out)]
    assert hashes[0] == hashes[1]
    with pytest.raises(DemixError, match=r"cannot read item 'expert\..*missing"):
        adapt(run, ("chat",), tmp_path / "out2", SETTINGS)
    assert not (tmp_path / "out2").exists()


def test_adding_can_wait(run, data, tmp_path, capsys):
    quick = dataclasses.replace(SETTINGS, steps=1)
    for add in (False, True):
        adapt(run, ("chat",), tmp_path / "out", quick, parent="med", add=add)
        assert ("chat" in newest_meta(run)["experts"]) == add
    assert "not added" in capsys.readouterr().out


# The parent.


def posterior(workdir: Path, data: Path, domain: str, sequences: int) -> dict[str, float]:
    """Bayes' rule in float64 over each validation sequence, averaged over its tokens."""
    found = load_run(workdir)
    checkpoints = Checkpointer(workdir)
    params = checkpoints.restore(60, found.model).state.params
    stream = PreparedData(data).tokens(domain, "valid")[:].astype(np.int32)
    total = np.zeros(len(DOMAINS))
    pieces = np.stack([stream[i : i + 17] for i in range(0, 16 * sequences, 16)])
    score = jax.jit(token_logprobs, static_argnums=0)
    scores = [
        score(found.model, join(params.shared, expert), pieces[:, :-1], pieces[:, 1:])
        for expert in (jax.tree.map(lambda x, e=e: x[e], params.experts) for e in range(3))
    ]
    for each in np.moveaxis(np.array(scores, np.float64), 1, 0):
        likelihood = np.cumsum(each, axis=1)  # [experts, tokens]
        weights = np.exp(likelihood - likelihood.max(0))
        total += (weights / weights.sum(0)).sum(1)
    return dict(zip(DOMAINS, total / total.sum(), strict=True))


@pytest.mark.slow
def test_the_parent_is_the_arg_max_of_the_posterior_on_100_sequences(base, data, run, tmp_path):
    """All of `news` would choose another parent than its first 100 sequences do."""
    weights = posterior(base, data, "news", 100)
    parent = max(weights, key=weights.get)
    everything = posterior(base, data, "news", 300)
    assert parent == "med" != max(everything, key=everything.get)
    adapt(run, ("news",), tmp_path / "out", dataclasses.replace(SETTINGS, steps=1), add=False)
    assert load_run(tmp_path / "out").parent.parents == {"news": "med"}
    cached = json.loads((run / "priors" / "news.json").read_text())
    np.testing.assert_allclose(cached["weights"], list(weights.values()), atol=1e-4)


@pytest.mark.slow
def test_the_posterior_is_of_the_experts_there_are_now(run, data, tmp_path):
    """A prior kept from before an edit does not know the experts that came since."""
    quick = dataclasses.replace(SETTINGS, steps=1)
    adapt(run, ("news",), tmp_path / "before", quick, add=False)
    adapt(run, ("drift",), tmp_path / "drift", quick, parent="med")
    remove_experts(run, ["med"], scan=False)
    adapt(run, ("news",), tmp_path / "after", quick, add=False)
    assert load_run(tmp_path / "after").parent.parents == {"news": "drift"}


# Several at once.


@pytest.mark.slow
def test_side_by_side_equals_alone(base, data, tmp_path):
    """Each with its own parent and early stopping, on a mesh with a real `domain` axis."""
    settings = dataclasses.replace(SETTINGS, steps=12)
    both, parents = ("chat", "drift"), {}
    adapt(base, both, tmp_path / "both", settings, add=False)
    for name in both:
        adapt(base, (name,), tmp_path / name, settings, add=False)
        parents |= load_run(tmp_path / name).parent.parents
    assert load_run(tmp_path / "both").parent.parents == parents
    assert len(set(parents.values())) == 2
    losses, steps = best(tmp_path / "both")
    alone = [best(tmp_path / name) for name in both]
    assert steps == [found[1][0] for found in alone]
    np.testing.assert_allclose(losses, [found[0][0] for found in alone], atol=1e-5)
    assert max(metas(tmp_path / "drift")) == 4 < max(metas(tmp_path / "chat")), "stops early alone"
    model = load_run(base).model

    def experts(workdir: Path) -> Checkpoint:
        return Checkpointer(workdir).restore(max(metas(workdir)), model)

    found = experts(tmp_path / "both").state.params.experts
    for i, name in enumerate(both):
        expected = experts(tmp_path / name).state.params.experts
        jax.tree.map(
            lambda a, b, i=i: np.testing.assert_allclose(a[i], b[0], atol=2e-5), found, expected
        )
    hashes = newest_meta(tmp_path / "both")["hashes"]
    parent = newest_meta(base)["hashes"][f"expert.{parents['drift']}"]
    assert hashes["expert.drift"] == parent, "training made it worse: it stays as it began"


# Dense models.


@pytest.mark.slow
def test_dense_dapt_trains_everything_and_adds_nothing(dense, data, tmp_path):
    before = files(dense / "checkpoints")
    losses = adapt(dense, ("chat",), tmp_path / "out", SETTINGS)
    assert losses["chat"] < validations(tmp_path / "out")[0] - 0.01
    meta, old = newest_meta(tmp_path / "out"), newest_meta(dense)
    assert meta["experts"] == ["dense"]
    for item in ("shared", "expert.dense"):
        assert meta["hashes"][item] != old["hashes"][item]
    assert "optimizer.shared" in meta["hashes"]
    assert not (tmp_path / "out" / "frozen").exists()
    assert files(dense / "checkpoints") == before


# Elsewhere.


@pytest.mark.slow
def test_an_expert_trained_elsewhere_is_the_one_trained_in_place(adapted, run, data, tmp_path):
    """Export the trunk, carry it away, adapt there, and bring the expert home."""
    there, away = tmp_path / "there", tmp_path / "away"
    materialize(run, ["law"], tmp_path / "trunk", variant="demix")
    shutil.copytree(tmp_path / "trunk", there / "trunk")
    shutil.rmtree(tmp_path / "trunk")
    for part in ("chat", "tokenizer"):
        shutil.copytree(data / part, there / "data" / part)
    (there / "data" / "data.json").write_text('{"train": [], "novel": ["chat"]}')
    run.rename(away)
    adapt(there / "trunk", ("chat",), there / "out", SETTINGS, data_dir=str(there / "data"))
    assert load_run(there / "out").parent.parents == {"chat": "law"}
    export_experts(there / "out", ["chat"], there / "chat.safetensors")
    away.rename(run)
    (there / "trunk").rename(there / "gone")
    import_experts(run, [there / "chat.safetensors"])
    home, in_place = newest_meta(run), newest_meta(adapted.run)
    assert home["hashes"]["expert.chat"] == in_place["hashes"]["expert.chat"]
    assert home["experts"] == in_place["experts"]
    assert home["provenance"]["chat"]["parent"] == "law"


# What is refused: one line, and nothing is written.


def edited(run: Path, **values: object) -> Path:
    path = run / "run.json"
    found = unseal(json.loads(path.read_text()))
    found["config"] |= values
    path.write_text(json.dumps(found))
    return run


@pytest.mark.parametrize(
    ("domains", "more", "message"),
    [
        (("chta",), {}, "unknown domain 'chta'; did you mean 'chat'"),
        (("law",), {}, "there is an expert 'law' already"),
        (("chat", "chat"), {}, "'chat' is named 2 times"),
        (("chat",), {"parent": "lew"}, "has no expert 'lew'; did you mean 'law'"),
        (("chat",), {"settings": Settings(batch_size=3)}, "batch_size 3 .* sizes that do"),
        (("chat",), {"settings": Settings(learning_rate=-1.0)}, "learning_rate must be positive"),
        (("chat",), {"data_dir": "/nowhere"}, "/nowhere holds no prepared data"),
    ],
)
def test_bad_input_changes_nothing(run, tmp_path, domains, more, message):
    before = files(tmp_path)
    with pytest.raises(DemixError, match=message) as error:
        adapt(run, domains, tmp_path / "out", **more)
    assert "\n" not in str(error.value)
    assert files(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_a_parent_of_a_dense_run_is_refused(dense, tmp_path):
    with pytest.raises(DemixError, match="is a dense run: it has no experts to be a --parent"):
        adapt(dense, ("chat",), tmp_path / "out", parent="law")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("variant", "message"),
    [("domain_token", "no token for a new domain"), ("demix", "has not branched yet at step 60")],
)
def test_runs_that_cannot_be_adapted(dense, tmp_path, variant, message):
    """Both look like a dense run but for their variant."""
    run = edited(Path(shutil.copytree(dense, tmp_path / "run")), variant=variant)
    with pytest.raises(DemixError, match=message):
        adapt(run, ("chat",), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_another_run_is_refused(adapted, run, dense):
    before = files(dense), files(adapted.out)
    with pytest.raises(DemixError, match="was not adapted from any run.*use another --out"):
        adapt(run, ("chat",), dense, SETTINGS)
    with pytest.raises(DemixError, match=f"began from {adapted.run}, asked for {run}"):
        adapt(run, ("chat",), adapted.out, SETTINGS)
    assert (files(dense), files(adapted.out)) == before


def test_other_settings_or_domains_are_refused_on_resuming(adapted):
    before = files(adapted.out / "checkpoints")
    with pytest.raises(DemixError, match="train.steps: 6 -> 7"):
        adapt(adapted.run, ("chat",), adapted.out, dataclasses.replace(SETTINGS, steps=7))
    with pytest.raises(DemixError, match="train_domains.*'news'"):
        adapt(adapted.run, ("news",), adapted.out, SETTINGS)
    assert files(adapted.out / "checkpoints") == before


def test_a_trunk_that_changed_since_is_refused(run, data, tmp_path, monkeypatch):
    """Killed before the first step, and then the run is another one with as many steps."""

    def adapting() -> object:
        return adapt(run, ("chat",), tmp_path / "out", SETTINGS, parent="law")

    stopped_at(0, monkeypatch, adapting)
    checkpoints = Checkpointer(run)
    found = checkpoints.restore(60, load_run(run).model)
    params = found.state.params
    shared = jax.tree.map(lambda leaf: leaf + np.float32(1e-3), params.shared)
    shutil.rmtree(run / "checkpoints")
    state = found.state._replace(params=params._replace(shared=shared), opt_state=params)
    other = Checkpointer(run)
    other.save(found._replace(state=state, manifest=dataclasses.replace(found.manifest, hashes={})))
    other.close()
    with pytest.raises(DemixError, match=r"the trunk of .* is \w+, and was \w+ when .* began"):
        adapting()
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_what_was_asked_may_change_before_the_first_step(run, data, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def adapting(domain: str, **settings: object) -> object:
        asked = dataclasses.replace(SETTINGS, **settings)
        return adapt(run, (domain,), out, asked, parent="law" if domain == "chat" else "med")

    stopped_at(0, monkeypatch, lambda: adapting("chat"))
    with pytest.raises(DemixError, match="train.seed must be"):
        adapting("chat", seed=2**32)
    stopped_at(0, monkeypatch, lambda: adapting("news", steps=7))
    assert load_run(out).domains == ("news",)
    assert load_run(out).config.train.steps == 7
    assert load_run(out).parent.parents == {"news": "med"}


def test_text_that_changed_since_is_refused(run, data, tmp_path, monkeypatch):
    copied = Path(shutil.copytree(data, tmp_path / "data"))

    def adapting() -> object:
        more = {"parent": "law", "data_dir": str(copied)}
        return adapt(run, ("chat",), tmp_path / "out", SETTINGS, **more)

    stopped_at(0, monkeypatch, adapting)
    shutil.rmtree(copied)
    tiny.write_prepared(copied, DOMAINS, novel=("chat",), train_documents=41)
    with pytest.raises(DemixError, match="the training text of chat in .* is not what the run"):
        adapting()


@pytest.mark.slow
def test_the_command_adapts_without_tensorflow(run, data, tmp_path):
    flags = ["--workdir", run, "--domain", "chat", "--out", tmp_path / "out"]
    flags += ["--steps=4", "--validate_every=2", "--learning_rate=0.005"]
    done = demix("adapt", *flags, blocked=TENSORFLOW)
    assert done.returncode == 0, done.stderr
    assert "chat: starts from" in done.stdout
    assert "step 4/4" in done.stdout
    assert "kept chat of step 4" in done.stdout
    assert f"added chat to {run}: experts law, med, code, chat" in done.stdout
    again = demix("adapt", *flags, blocked=TENSORFLOW)
    assert again.returncode == 0, again.stderr
    assert f"has chat of {tmp_path / 'out'} already" in again.stdout
