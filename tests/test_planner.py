"""Plans: what fits, what is refused, what is printed."""

import dataclasses
import functools
import json

import pytest
from forks import demix
from planned import config_of, step_of

from demix_jax.config.schema import MeshConfig
from demix_jax.errors import DemixError
from demix_jax.model.params import SPLITS
from demix_jax.planning.hardware import HARDWARE
from demix_jax.planning.memory import step_memory
from demix_jax.planning.planned_step import AbstractDevice, lay_out
from demix_jax.planning.planner import make_plan, out_of_memory_message, plan_phases
from demix_jax.planning.tables import phases_json, phases_text, plan_json, plan_text

estimate = functools.partial(make_plan, compiled=False)


def test_the_largest_batch_fits_and_a_larger_one_does_not():
    for variant, batch in (("demix", 48), ("dense_balanced", 16)):
        plan = estimate(config_of(variant=variant, batch=batch), devices=8, hardware="v5e")
        step, most = plan.step, plan.largest
        folded = 1 if variant == "demix" else 8
        at_once = most.batch * folded // step.devices_per_row
        assert step_memory(step, at_once, 1).device <= plan.step.hardware.hbm, variant
        assert step_memory(step, at_once + 1, 1).device > plan.step.hardware.hbm, variant
        assert step_memory(step, most.micro, 2).device <= plan.step.hardware.hbm, variant
        assert step_memory(step, most.micro + 1, 2).device > plan.step.hardware.hbm, variant
        assert most.grad_accum_steps == 1, variant


def test_names_of_hardware_are_read_in_any_case():
    plan = estimate(config_of(), devices=8, hardware="H100")
    assert plan.step.hardware.name == "h100"
    assert estimate(config_of(), topology="V5E:2x4").topology == "v5e:2x4"


def test_suggested_settings_fit():
    wide = {"layers": 24, "width": 2048, "heads": 32, "context": 1024, "vocab_size": 50_257}
    config = config_of(MeshConfig(), batch=256, remat="dots", logits_chunk=128, **wide)
    config.train.grad_accum_steps = 1
    plan = estimate(config, devices=256, hardware="v5e")
    line = out_of_memory_message(plan)
    assert f"{plan.excess / 2**30:.1f} too many" in line
    flags = line.split("; or ")[0].split("use ")[1].split()
    for flag in flags:
        key, value = flag.removeprefix("--config.").split("=")
        section, name = key.split(".")
        kind = type(getattr(getattr(config, section), name))
        setattr(getattr(config, section), name, kind(value))
    assert not estimate(config, devices=256, hardware="v5e").excess


ALL = (("embed",), ("layers",), ("norm",))
# Changes of the configuration, arguments of make_plan, and what the error says.
REFUSED = [
    ({}, {"topology": "v5x:4x4"}, "unknown topology 'v5x:4x4'; there are v5e:2x2, 2x4"),
    ({}, {"topology": "v5p:3x3x3"}, "unknown topology 'v5p:3x3x3'"),
    ({}, {"devices": 8, "hardware": "h10"}, "unknown hardware 'h10'; choose from h100, a100"),
    ({}, {"devices": 8, "hardware": "H10"}, "did you mean 'h100'"),
    ({}, {"devices": 99_999_999}, "99,999,999 devices cannot share a microbatch of"),
    ({"batch": 2**31 - 1}, {"devices": 99_999_999}, "plans are for 131,072 devices at most"),
    ({}, {}, "say what to plan for"),
    ({}, {"devices": 8, "topology": "v5e:2x4"}, "one of them"),
    ({"mesh": MeshConfig(domain=3)}, {"devices": 8}, "does not fit 8 experts on 8 devices"),
    ({"vocab_size": 0}, {"devices": 8}, "model.vocab_size is 0 and nothing/here holds no"),
]


def test_what_is_refused():
    for change, arguments, message in REFUSED:
        with pytest.raises(DemixError, match=message):
            make_plan(config_of(**change), **arguments)


def test_a_trunk_of_more_domains_than_there_are_is_refused():
    config = config_of()
    config.data.train_domains = ()
    config.train.branch_step, config.train.trunk_domains = 1, ("b", "c", "e")
    with pytest.raises(DemixError, match=r"names 3 domains \(b, c, e\), and there are 2 in all"):
        plan_phases(config, experts=2, devices=4)


def test_a_step_without_domains_is_refused():
    config = config_of()
    config.data.train_domains = ()
    with pytest.raises(DemixError, match="data.train_domains is empty .* give --experts"):
        make_plan(config, devices=8)


def test_text_and_json_say_the_same():
    plan = estimate(config_of(), devices=16)
    text, values = plan_text(plan), json.loads(json.dumps(plan_json(plan)))
    assert values["mesh"] == {"domain": 8, "data": 2, "model": 1}
    assert f"{values['seconds']['step']:.3g} s, MFU {100 * values['mfu']:.0f} %" in text
    causes = ("compute", "memory", "gradient_sync", "layer_collectives")
    assert sum(values["seconds"][k] for k in causes) == pytest.approx(values["seconds"]["step"])
    memory = values["memory"]
    parts = ("parameters", "optimizer", "gradients", "copies", "activations")
    halves = sum(sum(memory[part].values()) for part in parts)
    assert halves + memory["batch"] == pytest.approx(memory["device"])


def test_a_clean_trunk_is_planned_as_its_trainings():
    config = config_of()
    config.train = dataclasses.replace(
        config.train, steps=100, branch_step=30, trunk_domains=("b", "c", "e")
    )
    trunk, experts = phases = plan_phases(config, devices=4, compiled=False)
    assert [(phase.steps, phase.times) for phase in phases] == [(30, 1), (70, 8)]
    dense = config_of(variant="dense_balanced")
    dense.data.train_domains = ("b", "c", "e")
    assert trunk.plan.memory == estimate(dense, devices=4).memory
    alone = config_of()
    alone.data.train_domains = ("a",)
    alone.train.init_from, alone.train.freeze = "parent", "shared"
    assert experts.plan.memory == estimate(alone, devices=4).memory
    assert {cost.part for cost in experts.plan.collectives} == {"expert"}
    batch, context = 16, 24
    tokens = 30 * 3 * batch * context + 8 * 70 * batch * context
    values = json.loads(json.dumps(phases_json(phases)))
    seconds = 30 * trunk.plan.time.total + 8 * 70 * experts.plan.time.total
    assert (values["tokens"], values["seconds"]) == (tokens, pytest.approx(seconds))
    assert values["memory"] == max(phase.plan.memory.device for phase in phases)
    text = phases_text(phases)
    assert "== the trunk, on b, c, e: 30 steps\n" in text
    assert f"{30 * batch * context:,} tokens of each of its domains" in text
    assert text.endswith(f"{70 * batch * context:,} of its own: {tokens:,}")


def test_any_split_can_be_planned(monkeypatch):
    for owned in ((("layers",),), (("embed",),), (("layers", "attention"), ("layers", "ffn")), ALL):
        monkeypatch.setitem(SPLITS, "ffn", owned)
        mesh = MeshConfig(2, 2, model=2, shard="params")
        plan = estimate(config_of(mesh), devices=8)
        assert "step time" in plan_text(plan), owned
        experts = sum(c.sent_per_run for c in plan.collectives if c.part == "expert")
        assert experts > 0, owned


@pytest.mark.slow
def test_the_command(tmp_path):
    file = tmp_path / "plan.json"
    command = ["plan", "--experts", "8", "--nocompile"]
    command += ["--config", "configs/paper_1300m.py", "--out", file]
    fits = demix(*command, "--devices", "128")
    assert fits.returncode == 0, fits.stderr
    assert "step time" in fits.stdout
    assert json.loads(file.read_text())["fits"]
    refused = demix(*command, "--devices", "8", "--hardware", "v5e")
    assert refused.returncode == 2
    assert refused.stderr.startswith("demix plan: error: the step does not fit")
    assert refused.stderr.count("\n") == 1


def test_abstract_devices_make_the_mesh_of_real_ones():
    config = config_of(attention="xla")
    devices = [AbstractDevice(i, HARDWARE["h100"]) for i in range(8)]
    planned = lay_out(config, 8, devices, HARDWARE["h100"])
    assert planned.layout.mesh.shape == step_of(config).layout.mesh.shape
    assert step_memory(planned) == step_memory(step_of(config))
