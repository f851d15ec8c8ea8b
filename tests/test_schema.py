"""The configuration: what is accepted, what is refused by name, and what each field means."""

import dataclasses
from typing import Any

import pytest

from demix_jax.config.domain_values import parse_per_domain
from demix_jax.config.schema import Config, check_names, each_field, field_docs
from demix_jax.config.serialization import flat, from_dict
from demix_jax.errors import DemixError

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
    *(("model.expert_owns", value) for value in ("", "fnn", "attention+ffn", None)),
    *(("model.document_mask", value) for value in (1, "true", None)),
    *(
        (f"model.{name}", value)
        for name in ("norm", "norm_place", "positions", "rope_scaling", "activation", "qk_norm")
        for value in ("", "some", None)
    ),
    *(
        (f"model.{name}", value)
        for name in ("norm_eps", "rope_theta", "rope_low_freq_factor", "rope_high_freq_factor")
        for value in (0.0, -1.0, float("nan"), float("inf"), "1")
    ),
    *(("model.rope_factor", value) for value in (0.5, float("nan"), float("inf"))),
    ("model.rope_high_freq_factor", 1.0),  # the low one is 1
    *(("model.rope_original_context", value) for value in (0, 1.5)),
    ("model.rope_scaling", "linear"),  # of learned positions
    *(
        (f"model.{name}", value)
        for name in ("hidden", "kv_heads", "head_width")
        for value in (-1, 1.5)
    ),
    *(("model.kv_heads", value) for value in (5, 24)),  # of 12 heads
    *(
        (f"model.{name}", value)
        for name in ("qkv_bias", "out_bias", "ffn_bias", "tie_embeddings")
        for value in (1, "false", None)
    ),
    *(("model.attention", value) for value in ("", "flash", None)),
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
    *(("data.sources", value) for value in (None, 5)),
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
    *(("train.seed", value) for value in (-1, -(2**40))),
    ("train.patience", -1),
    ("train.grad_accum_steps", 3),  # does not divide 16
    *(("train.alpha", value) for value in (-0.1, float("nan"), float("inf"), "1")),
    *(
        ("train.sampling_weights", [value])
        for value in ("law", "law=", "=1", "law=x", "law=-1", "law=nan", "law=inf", "law=0", 0.5)
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
    ("model.kv_heads", 1),
    ("model.kv_heads", 12),
    ("model.head_width", 7),
    ("model.hidden", 1),
    ("model.rope_factor", 1.0),
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


def refusal(key: str, value: Any) -> str:
    """The message with which a value is refused; "" if it is not."""
    try:
        from_dict(nested(key, value))
    except DemixError as error:
        return str(error)
    return ""


def test_value_out_of_range_is_refused_by_name() -> None:
    for key, value in REFUSED:
        assert key.rpartition(".")[2] in refusal(key, value), f"{key}={value!r}"


def test_value_at_the_edge_is_accepted() -> None:
    for key, value in ACCEPTED:
        assert flat(from_dict(nested(key, value)))[key] == value, key


def test_every_field_has_a_meaning() -> None:
    sections = {type(section) for _, section, _ in each_field(Config())}
    for section in sections:
        docs = field_docs(section)
        assert set(docs) == {field.name for field in dataclasses.fields(section)}, section
        assert all(docs.values()), section


def test_a_meaning_goes_on_over_lines_until_the_section_ends() -> None:
    class Settings:
        """Some settings.

        Attributes:
          one: a number: 1.
          two: a longer text
            over: two lines.

        Raises:
          three: no field.
        """

    assert field_docs(Settings) == {"one": "a number: 1.", "two": "a longer text over: two lines."}
    assert field_docs(type("Bare", (), {})) == {}


def test_a_misspelt_way_to_share_names_the_nearest() -> None:
    with pytest.raises(DemixError, match="mesh.shard is 'parms'; .* did you mean 'params'"):
        from_dict({"mesh": {"shard": "parms"}})


def test_vocab_size_is_free_for_other_tokenizers() -> None:
    from_dict({"data": {"tokenizer": "bytes", "vocab_size": 1}})


def test_shapes_of_heads_that_cannot_be_say_what_to_change() -> None:
    for model, message in (
        ({"width": 100}, "model.width 100 is not a multiple of heads 12; .* set model.head_width"),
        ({"kv_heads": 5}, "model.kv_heads 5 does not divide heads 12"),
        ({"positions": "rope", "head_width": 7}, "model.head_width 7 is odd"),
        ({"positions": "rope", "heads": 256}, "model.head_width 3 is odd"),
        ({"rope_scaling": "llama3"}, "rope_scaling is 'llama3', but model.positions is 'learned'"),
        ({"activation": "swiglo"}, "model.activation is 'swiglo'; .* did you mean 'swiglu'"),
    ):
        with pytest.raises(DemixError, match=message):
            from_dict({"model": model})
    from_dict({"model": {"width": 100, "head_width": 6, "positions": "rope"}})


def test_patience_needs_validations_to_count() -> None:
    with pytest.raises(DemixError, match="train.patience counts validations"):
        from_dict({"train": {"patience": 1, "validate_every": 0}})


def test_branch_from_needs_a_branch_step() -> None:
    with pytest.raises(DemixError, match="branch_from needs train.branch_step"):
        from_dict({"train": {"branch_from": "runs/dense"}})


def test_only_demix_branches() -> None:
    for variant in ("dense", "dense_balanced", "domain_token"):
        values = {"variant": variant, "train": {"branch_step": 5, "branch_from": "runs/dense"}}
        with pytest.raises(DemixError, match=f"variant is '{variant}'"):
            from_dict(values)


def test_a_mixture_of_another_variant_is_refused() -> None:
    for variant, field, value in (
        ("demix", "alpha", 0.5),
        ("domain_token", "alpha", 0.0),
        ("dense_balanced", "sampling_weights", ["law=1"]),
        ("demix", "sampling_weights", ["law=1"]),
    ):
        with pytest.raises(DemixError, match=f"train.{field} is for variant dense; .* '{variant}'"):
            from_dict({"variant": variant, "train": {field: value}})


def test_a_mixture_names_training_domains_once() -> None:
    for field in ("sampling_weights", "max_tokens"):
        values: dict[str, Any] = {"variant": "dense" if field == "sampling_weights" else "demix"}
        values["data"] = {"train_domains": ["law", "med"]}
        good = ["law=2000", "med=3000"]
        from_dict(values | {"train": {field: good}})
        with pytest.raises(DemixError, match=rf"train.{field}: 'lwa' .* 'law'.*law, med"):
            from_dict(values | {"train": {field: [*good, "lwa=1000000"]}})
        with pytest.raises(DemixError, match=f"train.{field} names 'law' twice"):
            from_dict(values | {"train": {field: [*good, "law=3000"]}})


def test_sampling_weights_are_of_every_domain() -> None:
    values = {"variant": "dense", "data": {"train_domains": ["law", "med", "code"]}}
    with pytest.raises(
        DemixError, match="train.sampling_weights leaves out law, code; give every domain"
    ):
        from_dict(values | {"train": {"sampling_weights": ["med=1"]}})


def test_sampling_weights_and_alpha_exclude_each_other() -> None:
    with pytest.raises(DemixError, match="train.sampling_weights and train.alpha 0.5 both say"):
        from_dict({"variant": "dense", "train": {"sampling_weights": ["law=1"], "alpha": 0.5}})


def test_numbers_of_tokens_are_decimal() -> None:
    forms = {"65536": 65536, "100M": 10**8, "2B": 2 * 10**9, "2.5K": 2500, "0.3B": 3 * 10**8}
    entries = [f"d{i}={text}" for i, text in enumerate(forms)]
    assert list(parse_per_domain("max_tokens", entries).values()) == list(forms.values())


def test_max_tokens_of_one_sequence_is_accepted() -> None:
    """Which in `domain_token` has one token less of text."""
    from_dict({"train": {"max_tokens": ["law=1024"]}})
    from_dict({"variant": "domain_token", "train": {"max_tokens": ["law=1023"]}})
    with pytest.raises(DemixError, match="law=1022 .* less than one sequence.* 1023 or more"):
        from_dict({"variant": "domain_token", "train": {"max_tokens": ["law=1022"]}})


def test_splash_cannot_show_a_domain_token_to_every_document() -> None:
    model = {"document_mask": True, "attention": "splash"}
    from_dict({"model": model})
    with pytest.raises(DemixError, match="splash cannot show a domain token .* auto or xla"):
        from_dict({"variant": "domain_token", "model": model})


def test_domain_token_needs_room_for_text() -> None:
    with pytest.raises(DemixError, match="context"):
        from_dict({"variant": "domain_token", "model": {"context": 1}})


def test_int_is_cast_for_a_float() -> None:
    value = from_dict({"optim": {"clip": 1}}).optim.clip
    assert (type(value), value) == (float, 1.0)


def test_names_are_cast_to_a_tuple() -> None:
    for given, expected in (
        ("a,b", ("a", "b")),
        (" a , b,", ("a", "b")),
        ("a", ("a",)),
        ("", ()),
        (["a", "b"], ("a", "b")),
        (["a,b", "c"], ("a", "b", "c")),
        ([], ()),
    ):
        assert from_dict({"data": {"train_domains": given}}).data.train_domains == expected, given


def test_an_empty_entry_or_name_is_refused() -> None:
    for key, given in (
        ("train_domains", "a,,b"),
        ("train_domains", ",a"),
        ("train_domains", ["a", ""]),
        ("novel_domains", ["a,,", "b"]),
        ("dir", ""),
        ("tokenizer", ""),
    ):
        with pytest.raises(DemixError, match=rf"data.{key}.* (is empty|has an empty entry)"):
            from_dict({"data": {key: given}})


def test_seeds_and_sizes_beyond_the_range_are_refused() -> None:
    for section, key, value in (
        ("train", "seed", 2**32),
        ("train", "seed", 2**63),
        ("train", "seed", -1),
        ("train", "steps", 2**31),
        ("train", "batch_size", 10**12),
        ("model", "width", 2**31),
        ("model", "context", 10**30),
        ("mesh", "model", 2**40),
    ):
        with pytest.raises(DemixError, match=rf"{section}.{key} must be \d+ or (less|more)"):
            from_dict({section: {key: value}})
    assert from_dict({"train": {"seed": 2**32 - 1}}).train.seed == 2**32 - 1


def test_domain_names_fit_a_path_and_are_free() -> None:
    for name in ("law", "a", "2015-news_B", "x" * 64):
        check_names((name,))
    for name in (
        "",
        ".",
        "..",
        "a/b",
        "a b",
        "../a",
        "a.b",
        "-a",
        "_a",
        "é",
        "a\n",
        "x" * 65,
        "a\0",
    ):
        with pytest.raises(DemixError, match="does not fit a path"):
            check_names((name,))
    for name in ("tokenizer", "shared", "dense"):
        with pytest.raises(DemixError, match=f"'{name}' is taken"):
            check_names((name,))


def test_repeated_domain_is_refused() -> None:
    with pytest.raises(DemixError, match="'law' is named 2 times"):
        check_names(("law", "med", "law"))


def test_domain_that_is_trained_and_novel_is_refused() -> None:
    with pytest.raises(DemixError, match="train_domains and in data.novel_domains: law; name each"):
        from_dict({"data": {"train_domains": ["law", "med"], "novel_domains": ["law"]}})
