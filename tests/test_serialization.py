"""The configuration as JSON: what survives, what a resumed run may change, what hashes go by."""

import dataclasses
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from demix_jax.config import checks, schema, serialization
from demix_jax.config.schema import Config
from demix_jax.config.serialization import (
    config_hash,
    differences,
    field_type,
    flat,
    from_dict,
    to_dict,
    unknown_key,
)
from demix_jax.errors import DemixError

GOLDEN = Path(__file__).parent / "golden" / "before_rooms.tar.gz"
BASE = {"train": {"branch_step": 5}}  # lets train.branch_from be set
DENSE, ROPE = BASE | {"variant": "dense"}, BASE | {"model": {"positions": "rope"}}
NEEDS = {"train.alpha": DENSE, "train.sampling_weights": DENSE, "model.rope_scaling": ROPE} | {
    "train.init_from": {"train": {}},
    "train.freeze": {"train": {"init_from": "runs/imported"}},
}

# One valid value for each field that is not its default, and whether a resumed run may change it.
CHANGED = {
    "variant": ("dense", False),
    "model.layers": (3, False),
    "model.width": (96, False),
    "model.heads": (6, False),
    "model.context": (64, False),
    "model.vocab_size": (500, False),
    "model.dtype": ("bfloat16", False),
    "model.remat": ("dots", False),
    "model.scan_unroll": (2, False),
    "model.logits_chunk": (32, False),
    "model.expert_owns": ("layers", False),
    "model.output_bias_scale": (30.0, False),
    "model.document_mask": (True, False),
    "model.norm": ("rmsnorm", False),
    "model.norm_eps": (1e-6, False),
    "model.norm_place": ("post", False),
    "model.positions": ("rope", False),
    "model.rope_theta": (5e5, False),
    "model.rope_scaling": ("llama3", False),
    "model.rope_factor": (8.0, False),
    "model.rope_low_freq_factor": (2.0, False),
    "model.rope_high_freq_factor": (8.0, False),
    "model.rope_original_context": (4096, False),
    "model.activation": ("swiglu", False),
    "model.hidden": (100, False),
    "model.kv_heads": (4, False),
    "model.head_width": (96, False),
    "model.qkv_bias": (False, False),
    "model.out_bias": (False, False),
    "model.ffn_bias": (False, False),
    "model.qk_norm": ("head", False),
    "model.tie_embeddings": (False, False),
    "model.attention": ("xla", True),
    "data.dir": ("elsewhere", True),
    "data.sources": (["embedded", "texts"], True),
    "data.train_domains": (["law", "med"], False),
    "data.novel_domains": (["news"], True),
    "data.tokenizer": ("bytes", True),
    "data.vocab_size": (1000, True),
    "data.skip_bad_lines": (7, True),
    "data.dedup": ("near", True),
    "data.dedup_threshold": (0.9, True),
    "data.part_bytes": (1000, True),
    "optim.learning_rate": (1e-3, False),
    "optim.warmup": (0.5, False),
    "optim.beta1": (0.0, False),
    "optim.beta2": (0.999, False),
    "optim.eps": (1e-8, False),
    "optim.weight_decay": (0.0, False),
    "optim.clip": (1.0, False),
    "train.steps": (6, False),
    "train.batch_size": (4, False),
    "train.grad_accum_steps": (8, False),
    "train.seed": (42, False),
    "train.alpha": (0.5, False),
    "train.sampling_weights": (["law=0.3", "med=0.7"], False),
    "train.max_tokens": (["law=100M", "med=2048"], False),
    "train.branch_step": (999, False),
    "train.branch_from": ("runs/dense", False),
    "train.trunk_domains": (["law"], False),
    "train.init_from": ("runs/imported", False),
    "train.freeze": ("shared", False),
    "train.log_every": (1, True),
    "train.validate_every": (0, True),
    "train.validate_tokens": (1, True),
    "train.patience": (2, False),
    "train.nonfinite": ("skip", True),
    "train.max_skipped": (3, True),
    "train.checkpoint_every": (1, True),
    "train.keep_checkpoints": (1, True),
    "mesh.domain": (2, True),
    "mesh.data": (4, True),
    "mesh.model": (2, True),
    "mesh.shard": ("optimizer", True),
    "mesh.offload_optimizer": (True, True),
}


def nested(key: str, value: Any) -> dict[str, Any]:
    *sections, name = key.split(".")
    values = {name: value}
    for section in reversed(sections):
        values = {section: values}
    return values


def before(key: str) -> dict[str, Any]:
    """Values under which a field can be changed."""
    return NEEDS.get(key, BASE)


def changed(key: str) -> Config:
    values = before(key) | nested(key, CHANGED[key][0])
    if "." in key:
        section = key.partition(".")[0]
        values[section] = before(key).get(section, {}) | values[section]
    return from_dict(values)


def golden() -> dict[str, Any]:
    """What an older version wrote: configurations with former keys, and their hashes."""
    with tarfile.open(GOLDEN) as archive:
        return json.load(archive.extractfile("expected.json"))


def test_every_field_is_tested_here() -> None:
    assert set(flat(Config())) == set(CHANGED)


def test_fields_survive_json() -> None:
    assert from_dict(json.loads(json.dumps(to_dict(Config())))) == Config()
    for key, (value, _) in CHANGED.items():
        config = changed(key)
        values = json.loads(json.dumps(to_dict(config)))
        assert flat(config)[key] == value != flat(Config())[key], key
        assert from_dict(values) == config, key


def test_resumed_run_may_change_only_free_fields() -> None:
    for key, (value, free) in CHANGED.items():
        base = from_dict(before(key))
        expected = [] if free else [f"{key}: {flat(base)[key]!r} -> {value!r}"]
        assert differences(base, changed(key)) == expected


def test_hash_changes_with_every_field_that_is_not_free() -> None:
    for key, (_, free) in CHANGED.items():
        base = from_dict(before(key))
        assert (config_hash(changed(key)) == config_hash(base)) == free, key


def test_all_differences_are_named() -> None:
    new = {"variant": "dense", "train": {"steps": 10, "log_every": 3}, "model": {"layers": 2}}
    assert differences(Config(), from_dict(new)) == [
        "variant: 'demix' -> 'dense'",
        "model.layers: 12 -> 2",
        "train.steps: 1000 -> 10",
    ]


def test_configs_of_older_versions_load_and_hash_the_same() -> None:
    expected = golden()
    for name in ("default_config", "other_config"):
        old = expected[name]
        assert config_hash(from_dict(old)) == expected[f"{name}_hash"], name
        assert config_hash(from_dict(to_dict(from_dict(old)))) == expected[f"{name}_hash"], name
    assert from_dict(expected["default_config"]) == Config()
    train = from_dict(expected["other_config"]).train
    assert train.sampling_weights == ("law=0.3", "med=0.7")
    assert (train.max_tokens, train.grad_accum_steps) == (("law=100M",), 2)


def test_a_removed_field_is_refused_unless_at_its_default() -> None:
    assert from_dict({"train": {"replicas": []}}) == Config()
    with pytest.raises(DemixError, match="unknown config key 'train.replicas'"):
        from_dict({"train": {"replicas": ["law=2"]}})


def test_a_field_added_later_leaves_hashes_alone(monkeypatch) -> None:
    """At its default; at another value, or without being marked, it enters them."""
    expected = golden()["default_config_hash"]
    for later, value, same in ((True, 3, True), (True, 4, False), (False, 3, False)):

        @dataclasses.dataclass(unsafe_hash=True)
        class Model(schema.ModelConfig):
            added: int = checks.setting(3, later=later)

        @dataclasses.dataclass(unsafe_hash=True)
        class Grown(Config):
            model: Model = dataclasses.field(default_factory=Model)

        monkeypatch.setattr(serialization, "Config", Grown)
        assert (config_hash(Grown(model=Model(added=value))) == expected) == same, (later, value)


def test_unknown_key_names_the_nearest() -> None:
    for key, nearest in (
        ("train.stepz", "train.steps"),
        ("optim.learning_rat", "optim.learning_rate"),
        ("model.contxt", "model.context"),
        ("varient", "variant"),
    ):
        assert f"unknown config key {key!r}; did you mean {nearest!r}?" in unknown_key(key)
        with pytest.raises(DemixError, match=f"did you mean {nearest!r}"):
            from_dict(nested(key, 1))
    message = unknown_key("zzzzzzzz")
    assert "did you mean" not in message
    assert all(key in message for key in CHANGED)


def test_attribute_that_is_no_field_is_refused() -> None:
    values: dict[str, Any]
    for values in (
        {"train": {"validate": 3}},
        {"validate": 1},
        {"variant": {"upper": 1}},
        {"__class__": 1},
        {"model": {"layers": {"real": 1}}},
    ):
        with pytest.raises(DemixError, match="unknown config key"):
            from_dict(values)


def test_fields_and_nothing_else_have_a_type() -> None:
    for key in CHANGED:
        assert field_type(key) in (str, int, float, bool, tuple[str, ...])
    for key in ("train", "train.stepz", "steps", "", "train.validate"):
        with pytest.raises(DemixError, match="unknown config key"):
            field_type(key)
