"""The configuration: what is accepted, what is refused, and what a resumed run may change."""

import json
from typing import Any

import pytest

from demix_jax.config.domain_values import parse_per_domain
from demix_jax.config.schema import Config, check_names
from demix_jax.config.serialization import differences, field_type, from_dict, to_dict, unknown_key
from demix_jax.errors import DemixError

BASE = {"train": {"branch_step": 5}}  # lets train.branch_from be set
OF_DENSE = ("train.alpha", "train.sampling_weights")

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
    "model.document_mask": (True, False),
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
    "train.replicas": (["law=2"], False),
    "train.max_tokens": (["law=100M", "med=2048"], False),
    "train.branch_step": (999, False),
    "train.branch_from": ("runs/dense", False),
    "train.log_every": (1, True),
    "train.validate_every": (0, True),
    "train.validate_tokens": (1, True),
    "train.patience": (2, False),
    "train.checkpoint_every": (1, True),
    "train.keep_checkpoints": (1, True),
    "mesh.domain": (2, True),
    "mesh.data": (4, True),
    "mesh.model": (2, True),
    "mesh.shard": ("optimizer", True),
    "mesh.offload_optimizer": (True, True),
}

REFUSED = [
    ("variant", "moe"),
    ("variant", ""),
    *((f"model.{name}", value) for name in ("layers", "width", "heads") for value in (0, -1, 1.5)),
    *((f"model.{name}", value) for name in ("context", "scan_unroll") for value in (0, -1, "1")),
    ("model.width", 100),  # not a multiple of 12 heads
    ("model.vocab_size", -1),
    ("model.logits_chunk", -1),
    ("model.logits_chunk", 3),  # does not divide 1024
    ("model.dtype", "float16"),
    ("model.remat", "some"),
    *(("model.document_mask", value) for value in (1, "true", None)),
    ("data.sources", []),
    ("data.sources", ","),
    ("data.vocab_size", 299),
    ("data.vocab_size", 256_001),
    ("data.skip_bad_lines", -1),
    ("data.dedup", "some"),
    *(("data.dedup_threshold", value) for value in (0.49, 1.01, float("nan"))),
    ("data.part_bytes", 0),
    ("data.tokenizer", None),
    ("data.dir", 3),
    *(
        (f"optim.{name}", value)
        for name in ("learning_rate", "eps", "clip")
        for value in (0.0, -1e-3, float("nan"), float("inf"), "1e-3", True)
    ),
    *(
        (f"optim.{name}", value)
        for name in ("warmup", "beta1", "beta2")
        for value in (-0.01, 1.0, float("nan"), None)
    ),
    *(("optim.weight_decay", value) for value in (-0.1, float("nan"), float("inf"))),
    *(
        (f"train.{name}", value)
        for name in ("steps", "batch_size", "grad_accum_steps", "log_every", "checkpoint_every")
        for value in (0, -1, 2.0, True)
    ),
    ("train.keep_checkpoints", 0),
    ("train.validate_tokens", 0),
    ("train.validate_every", -1),
    ("train.patience", -1),
    ("train.grad_accum_steps", 3),  # does not divide 16
    *(("train.alpha", value) for value in (-0.1, float("nan"), float("inf"), "1")),
    *(
        ("train.sampling_weights", [value])
        for value in ("law", "law=", "=1", "law=x", "law=-1", "law=nan", "law=inf", "law=0", 0.5)
    ),
    *(
        ("train.replicas", [value])
        for value in ("law", "law=", "=1", "law=x", "law=0", "law=-1", "law=1.5", "law=inf")
    ),
    *(
        ("train.max_tokens", [value])
        for value in ("law", "law=", "=1M", "law=x", "law=-1M", "law=0", "law=1T", "law=M")
    ),
    ("train.max_tokens", ["law=0.0001K"]),  # not a whole number
    ("train.max_tokens", ["law=100.5"]),
    ("train.max_tokens", ["law=100 M"]),
    ("train.max_tokens", ["law=1023"]),  # a sequence has 1024
    ("train.branch_step", -1),
    ("train.branch_step", 1000),  # all the steps
    ("mesh.domain", -1),
    ("mesh.data", -2),
    *(("mesh.model", value) for value in (0, -1, 1.5, "2")),
    *(("mesh.shard", value) for value in ("", "param", "zero", None)),
    *(("mesh.offload_optimizer", value) for value in (1, "true", None)),
]

ACCEPTED = [
    ("data.vocab_size", 300),
    ("data.vocab_size", 256_000),
    ("model.logits_chunk", 1024),
    ("optim.warmup", 0.0),
    ("train.branch_step", 999),
    ("train.grad_accum_steps", 16),
    ("train.validate_every", 0),
    ("mesh.model", 1),
    ("mesh.shard", "params"),
]


def nested(key: str, value: Any) -> dict[str, Any]:
    *sections, name = key.split(".")
    values = {name: value}
    for section in reversed(sections):
        values = {section: values}
    return values


def changed(key: str) -> Config:
    values = nested(key, CHANGED[key][0])
    if key in OF_DENSE:
        values["variant"] = "dense"
    if "train" in values:
        values["train"] = BASE["train"] | values["train"]
    return from_dict(BASE | values)


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        inside = isinstance(value, dict)
        found |= leaves(value, f"{prefix}{key}.") if inside else {prefix + key: value}
    return found


def test_every_field_is_tested_here() -> None:
    assert set(leaves(to_dict(Config()))) == set(CHANGED)


def test_defaults_survive_json() -> None:
    assert from_dict(json.loads(json.dumps(to_dict(Config())))) == Config()


@pytest.mark.parametrize("key", CHANGED)
def test_field_survives_json(key: str) -> None:
    values = json.loads(json.dumps(to_dict(changed(key))))
    assert leaves(values)[key] == CHANGED[key][0] != leaves(to_dict(Config()))[key]
    assert from_dict(values) == changed(key)


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_value_out_of_range_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(DemixError, match=key.rpartition(".")[2]):
        from_dict(nested(key, value))


@pytest.mark.parametrize(("key", "value"), ACCEPTED)
def test_value_at_the_edge_is_accepted(key: str, value: Any) -> None:
    assert leaves(to_dict(from_dict(nested(key, value))))[key] == value


def test_a_misspelt_way_to_share_names_the_nearest() -> None:
    with pytest.raises(DemixError, match="mesh.shard is 'parms'; .* did you mean 'params'"):
        from_dict({"mesh": {"shard": "parms"}})


def test_vocab_size_is_free_for_other_tokenizers() -> None:
    from_dict({"data": {"tokenizer": "bytes", "vocab_size": 1}})


def test_patience_needs_validations_to_count() -> None:
    with pytest.raises(DemixError, match="train.patience counts validations"):
        from_dict({"train": {"patience": 1, "validate_every": 0}})


def test_branch_from_needs_a_branch_step() -> None:
    with pytest.raises(DemixError, match="branch_from needs train.branch_step"):
        from_dict({"train": {"branch_from": "runs/dense"}})


@pytest.mark.parametrize("variant", ["dense", "dense_balanced", "domain_token"])
def test_only_demix_branches(variant: str) -> None:
    with pytest.raises(DemixError, match=f"variant is '{variant}'"):
        from_dict({"variant": variant, "train": {"branch_step": 5, "branch_from": "runs/dense"}})


@pytest.mark.parametrize(
    ("variant", "field", "value", "fit"),
    [
        ("demix", "alpha", 0.5, "dense"),
        ("domain_token", "alpha", 0.0, "dense"),
        ("dense_balanced", "sampling_weights", ["law=1"], "dense"),
        ("demix", "sampling_weights", ["law=1"], "dense"),
        ("dense", "replicas", ["law=2"], "demix, dense_balanced, domain_token"),
    ],
)
def test_a_mixture_of_another_variant_is_refused(
    variant: str, field: str, value: Any, fit: str
) -> None:
    with pytest.raises(DemixError, match=f"train.{field} is for variant {fit}; .* '{variant}'"):
        from_dict({"variant": variant, "train": {field: value}})


@pytest.mark.parametrize("field", ["sampling_weights", "replicas", "max_tokens"])
def test_a_mixture_names_training_domains_once(field: str) -> None:
    values: dict[str, Any] = {"variant": "dense" if field == "sampling_weights" else "demix"}
    values["data"] = {"train_domains": ["law", "med"]}
    good = ["law=2000", "med=3000"]
    from_dict(values | {"train": {field: good}})
    with pytest.raises(DemixError, match=rf"train.{field}: 'lwa' .* 'law'.*law, med"):
        from_dict(values | {"train": {field: [*good, "lwa=1000000"]}})
    with pytest.raises(DemixError, match=f"train.{field} names 'law' twice"):
        from_dict(values | {"train": {field: [*good, "law=3000"]}})


def test_rates_are_of_every_domain() -> None:
    values = {"variant": "dense", "data": {"train_domains": ["law", "med", "code"]}}
    with pytest.raises(
        DemixError, match="train.sampling_weights leaves out law, code; give every domain"
    ):
        from_dict(values | {"train": {"sampling_weights": ["med=1"]}})


def test_rates_and_alpha_exclude_each_other() -> None:
    with pytest.raises(DemixError, match="train.sampling_weights and train.alpha 0.5 both say"):
        from_dict({"variant": "dense", "train": {"sampling_weights": ["law=1"], "alpha": 0.5}})


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("65536", 65536), ("100M", 10**8), ("2B", 2 * 10**9), ("2.5K", 2500), ("0.3B", 3 * 10**8)],
)
def test_budgets_are_decimal(text: str, tokens: int) -> None:
    assert parse_per_domain("max_tokens", [f"law={text}"]) == {"law": tokens}


def test_a_budget_of_one_sequence_is_accepted() -> None:
    """Which in `domain_token` has one token less of text."""
    from_dict({"train": {"max_tokens": ["law=1024"]}})
    from_dict({"variant": "domain_token", "train": {"max_tokens": ["law=1023"]}})
    with pytest.raises(DemixError, match="law=1022 .* less than one sequence.* 1023 or more"):
        from_dict({"variant": "domain_token", "train": {"max_tokens": ["law=1022"]}})


@pytest.mark.parametrize("seed", [-1, -(2**40)])
def test_negative_seed_is_refused(seed: int) -> None:
    with pytest.raises(DemixError, match="seed"):
        from_dict({"train": {"seed": seed}})


def test_domain_token_needs_room_for_text() -> None:
    with pytest.raises(DemixError, match="context"):
        from_dict({"variant": "domain_token", "model": {"context": 1}})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.stepz", "train.steps"),
        ("optim.learning_rat", "optim.learning_rate"),
        ("model.contxt", "model.context"),
        ("varient", "variant"),
    ],
)
def test_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    assert f"unknown config key {key!r}; did you mean {nearest!r}?" in unknown_key(key)
    with pytest.raises(DemixError, match=f"did you mean {nearest!r}"):
        from_dict(nested(key, 1))


def test_unknown_key_lists_the_valid_ones_when_none_is_near() -> None:
    message = unknown_key("zzzzzzzz")
    assert "did you mean" not in message
    assert all(key in message for key in CHANGED)


@pytest.mark.parametrize(
    "values",
    [
        {"train": {"validate": 3}},
        {"validate": 1},
        {"variant": {"upper": 1}},
        {"__class__": 1},
        {"model": {"layers": {"real": 1}}},
    ],
)
def test_attribute_that_is_no_field_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(DemixError, match="unknown config key"):
        from_dict(values)


@pytest.mark.parametrize("value", [None, 5])
def test_list_that_is_no_list_is_refused(value: Any) -> None:
    with pytest.raises(DemixError, match="sources"):
        from_dict({"data": {"sources": value}})


@pytest.mark.parametrize("key", CHANGED)
def test_every_field_has_a_type(key: str) -> None:
    assert field_type(key) in (str, int, float, bool, tuple[str, ...])


@pytest.mark.parametrize("key", ["train", "train.stepz", "steps", "", "train.validate"])
def test_nothing_else_has_a_type(key: str) -> None:
    with pytest.raises(DemixError, match="unknown config key"):
        field_type(key)


def test_int_is_cast_for_a_float() -> None:
    value = from_dict({"optim": {"clip": 1}}).optim.clip
    assert (type(value), value) == (float, 1.0)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a,b", ("a", "b")),
        (" a , b,", ("a", "b")),
        ("a", ("a",)),
        ("", ()),
        (["a", "b"], ("a", "b")),
        (["a,b", "c"], ("a", "b", "c")),
        ([], ()),
    ],
)
def test_names_are_cast_to_a_tuple(given: Any, expected: tuple[str, ...]) -> None:
    assert from_dict({"data": {"train_domains": given}}).data.train_domains == expected


@pytest.mark.parametrize("key", [key for key in CHANGED if CHANGED[key][1]])
def test_resumed_run_may_change(key: str) -> None:
    assert differences(from_dict(BASE), changed(key)) == []


@pytest.mark.parametrize("key", [key for key in CHANGED if not CHANGED[key][1]])
def test_resumed_run_may_not_change(key: str) -> None:
    base = from_dict(BASE | ({"variant": "dense"} if key in OF_DENSE else {}))
    old = leaves(to_dict(base))[key]
    expected = [f"{key}: {old!r} -> {CHANGED[key][0]!r}"]
    assert differences(base, changed(key)) == expected


def test_all_differences_are_named() -> None:
    new = {"variant": "dense", "train": {"steps": 10, "log_every": 3}, "model": {"layers": 2}}
    assert differences(Config(), from_dict(new)) == [
        "variant: 'demix' -> 'dense'",
        "model.layers: 12 -> 2",
        "train.steps: 1000 -> 10",
    ]


@pytest.mark.parametrize("name", ["law", "a", "2015-news_B", "x" * 64])
def test_domain_name_is_accepted(name: str) -> None:
    check_names((name,))


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a b", "../a", "a.b", "-a", "_a", "é", "a\n", "x" * 65, "a\0"]
)
def test_domain_name_unfit_for_a_path_is_refused(name: str) -> None:
    with pytest.raises(DemixError, match="does not fit a path"):
        check_names((name,))


@pytest.mark.parametrize("name", ["tokenizer", "shared"])
def test_domain_name_that_the_library_uses_is_refused(name: str) -> None:
    with pytest.raises(DemixError, match=name):
        check_names((name,))


def test_repeated_domain_is_refused() -> None:
    with pytest.raises(DemixError, match="'law' is named 2 times"):
        check_names(("law", "med", "law"))


def test_domain_that_is_trained_and_novel_is_refused() -> None:
    with pytest.raises(DemixError, match="train_domains and in data.novel_domains: law; name each"):
        from_dict({"data": {"train_domains": ["law", "med"], "novel_domains": ["law"]}})
