"""The library against transformers: models that it made come in, experts go out to it."""

import argparse
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import hf_folders
import numpy as np
import pytest
import test_import_fairseq
import tiny
import torch
import transformers

import demix_jax
from demix_jax.data.sources.base import BadRecords
from demix_jax.data.sources.hub_source import HubSource
from demix_jax.errors import DemixError
from demix_jax.interop.export_model import export_model
from demix_jax.interop.import_fairseq import import_fairseq
from demix_jax.interop.import_model import import_model

TEXT = "The court held that the motion was late.\n\n    def f(x):  return [x]\n"
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
}
GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2, exact GELU, untied": (
        "GPT2",
        GPT2 | {"activation_function": "gelu", "n_inner": 40, "tie_word_embeddings": False},
    ),
    "llama": ("Llama", SHAPE),
    "llama, every bias, scaled rope, tied": (
        "Llama",
        SHAPE
        | {"rope_parameters": LLAMA3, "head_dim": 10, "tie_word_embeddings": True}
        | {"attention_bias": True, "mlp_bias": True},
    ),
    "llama, linear rope": (
        "Llama",
        SHAPE | {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "qwen2": ("Qwen2", SHAPE | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", SHAPE | {"head_dim": 16}),
    "olmo2": ("Olmo2", SHAPE),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory, tokenizer_dir) -> Path:
    """A small random model that transformers made, with its tokenizer."""
    kind, values = MODELS[request.param]
    suffix = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    size = len(transformers.AutoTokenizer.from_pretrained(tokenizer_dir))
    made = getattr(transformers, f"{kind}Config")(
        **values, vocab_size=size, bos_token_id=0, eos_token_id=0, initializer_range=0.2
    )
    torch.manual_seed(0)
    model = getattr(transformers, kind + suffix)(made)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases begin as ones and zeros
                parameter.add_(0.1 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("models") / "hf"
    model.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(path)
    return path


def logprobs(model: Any, ids: list[int]) -> np.ndarray:
    """Log-probabilities of every token after every beginning of `ids`, [T, V]."""
    with torch.no_grad():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0], -1).numpy()


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    made = model.generate(
        torch.tensor([ids]), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return made[0].tolist()[len(ids) :]


def test_a_model_of_transformers_computes_the_same_here(folder, tmp_path):
    workdir = import_model(folder, tmp_path / "run", variant="demix", experts=["law", "med"])
    lm = demix_jax.load(workdir)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    scores = lm.score(TEXT)
    ids = [0, *scores.tokens[0].tolist()]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT, add_special_tokens=False).input_ids == ids[1:]
    expected = logprobs(theirs, ids)[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(scores.token_logprobs[0, 0], expected, rtol=0, atol=1e-4)
    made = lm.generate(TEXT, expert="law", max_tokens=16, temperature=0)
    new = list(made.tokens[len(ids) - 1 :])
    following = greedy(theirs, ids, 16)
    assert new == following[: len(new)]
    assert len(new) == 16 or following[len(new)] == 0  # the end of the document


def test_what_came_from_transformers_goes_back_bit_for_bit(folder, tmp_path):
    workdir = import_model(folder, tmp_path / "run")
    out = export_model(workdir, tmp_path / "out")
    assert (out / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    configs = [
        transformers.AutoConfig.from_pretrained(path).to_dict() | {"_name_or_path": ""}
        for path in (folder, out)
    ]
    assert configs[0] == configs[1]
    assert json.loads((out / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )


def test_a_trained_expert_is_the_same_model_in_transformers(workdir, tmp_path):
    held_out = tiny.sentences("law", 8, seed=77)
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 0.05)):
        out = export_model(workdir, tmp_path / dtype, expert="law", dtype=dtype)
        model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
        assert type(model).__name__ == "GPT2LMHeadModel"
        assert str(model.dtype) == f"torch.{dtype}"
        model = model.float()
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        lm = demix_jax.load(workdir, experts=["law"])
        ours = lm.score(held_out)
        nats, count = 0.0, 0
        for text in held_out:
            ids = tokenizer(text).input_ids[:65]
            nats -= logprobs(model, ids[:-1])[np.arange(len(ids) - 1), ids[1:]].sum()
            count += len(ids) - 1
        short = ours.mask[:, :64]
        expected = -ours.mixture_logprobs[:, :64][short].sum() / short.sum()
        assert count == short.sum()
        assert abs(nats / count - expected) < tolerance
    ids = tokenizer("court ").input_ids
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "float32").eval()
    made = lm.generate("court ", max_tokens=24, temperature=0)
    new = list(made.tokens[len(ids) - 1 :])
    assert len(new) > 8
    assert new == greedy(model, ids, len(new))


def test_a_merge_is_the_average_of_experts(workdir, tmp_path):
    weights = {"law": 0.25, "med": 0.75}
    merged, law, med = (
        transformers.AutoModelForCausalLM.from_pretrained(
            export_model(workdir, tmp_path / str(i), **options)
        ).state_dict()
        for i, options in enumerate(({"weights": weights}, {"expert": "law"}, {"expert": "med"}))
    )
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, 0.25 * law[name] + 0.75 * med[name], msg=name)


def test_datasets_are_streamed_from_folders(tmp_path):
    import datasets

    rows = [{"text": f"row {i}", "lang": "en" if i % 2 else "de"} for i in range(40)]
    saved = datasets.DatasetDict(
        {name: datasets.Dataset.from_list(part)
         for name, part in (("train", rows[:30]), ("validation", rows[30:]))}
    )  # fmt: skip
    saved.save_to_disk(str(tmp_path / "saved"), num_shards={"train": 3, "validation": 1})
    (tmp_path / "files").mkdir()
    for name, part in saved.items():
        part.to_parquet(str(tmp_path / "files" / f"{name}.parquet"))
    for name, parts in (("saved", 4), ("files", 2)):
        source = HubSource(str(tmp_path / name), {"where": ["lang:en"]})
        found = source.parts()
        assert len(found) == parts
        documents = [d for part in found for d in part.documents(BadRecords())]
        expected = [row["text"] for row in rows if row["lang"] == "en"]
        assert [d.text for d in documents] == expected
        assert {d.split for d in documents[15:]} == {"valid"}
        assert len({d.id for d in documents}) == len(documents)
        assert source.fingerprint() == HubSource(str(tmp_path / name), {"where": ["lang:en"]}
                                                 ).fingerprint()  # fmt: skip
    with pytest.raises(DemixError, match=r"no field 'body' in 'train'; name the text by \?field="):
        HubSource(str(tmp_path / "files"), {"field": "body"}).parts()
    with pytest.raises(DemixError, match="cannot be read: .*offline"):
        HubSource("some/dataset", {}).parts()


def test_checkpoints_that_torch_wrote_are_read_without_it(tmp_path):
    shared, experts = test_import_fairseq.parameters()
    folder = tmp_path / "released"
    folder.mkdir()
    settings = argparse.Namespace(decoder_attention_heads=4, activation_fn="gelu")
    files = {"shared": shared, **{f"rank-{i}": x for i, x in enumerate(experts)}}
    for name, arrays in files.items():
        model = OrderedDict((n, torch.nn.Parameter(torch.tensor(x))) for n, x in arrays.items())
        torch.save({"args": settings, "cfg": None, "model": model}, folder / f"last-{name}.pt")
    (folder / "dict.txt").write_text("".join(f"{i} 1\n" for i in range(28)))
    hf_folders.write_tokenizer(folder / "tokenizer.json")
    workdir = import_fairseq(
        folder, tmp_path / "run", str(folder / "tokenizer.json"), test_import_fairseq.NAMES
    )
    scores = demix_jax.load(workdir).score("abcdefghij")
    ids = np.array([2, *(4 + scores.tokens[0])])  # of fairseq
    rows = np.array([*range(4, 32), 2])
    for i, expert in enumerate(experts):
        logits = test_import_fairseq.reference(shared, expert, ids[:-1])[:, rows]
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = expected[np.arange(10), scores.tokens[0]]
        np.testing.assert_allclose(scores.token_logprobs[i, 0], expected, rtol=0, atol=1e-4)
