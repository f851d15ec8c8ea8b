"""Runs as model folders of transformers: numbers, tokenizers, and what cannot go there."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from cases import case
from edits import array, make_run, meta_of
from hf_folders import read_tensors
from test_tokenizers import HARD, any_characters, generated

import demix_jax
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.data.prepare.train_tokenizer import train_sentencepiece
from demix_jax.data.tokenizers import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    save_tokenizer,
)
from demix_jax.errors import DemixError
from demix_jax.experts.widen import widen_experts
from demix_jax.interop.export_model import export_model
from demix_jax.interop.import_model import import_model
from demix_jax.interop.tokenizer_json import make_tokenizer

TEXTS = (*(text for name, text in HARD.items() if name != "pieces by name"), *generated(3, 20))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("export") / "run")


def test_an_exported_expert_comes_back_as_it_was(tmp_path, run):
    out = export_model(run, tmp_path / "out", expert="med")
    again = load_run(import_model(out, tmp_path / "again")).latest()
    newest = load_run(run).latest().manifest
    assert again.manifest.trunk == newest.trunk
    assert again.manifest.expert_hash("dense") == newest.expert_hash("med")
    assert again.run.tokenizer.encode_batch(["é x"])[0].tolist() == [0xC3, 0xA9, 32, 120]
    assert again.run.model.eod == 256
    card = (out / "README.md").read_text()
    for text in ("`GPT2LMHeadModel`", "| med | 1 | trained", newest.trunk, "token 256"):
        assert text in card
    files = {path.name for path in out.iterdir()}
    assert files == {"README.md", "config.json", "generation_config.json", "model.safetensors",
                     "tokenizer.json", "tokenizer_config.json"}  # fmt: skip


@pytest.mark.slow
def test_the_python_calls_do_what_the_commands_do(tmp_path, run):
    lm = demix_jax.load(run)
    one = lm.with_experts("law").save_pretrained(tmp_path / "one")
    both = lm.save_pretrained(tmp_path / "both", {"law": 0.5, "med": 0.5}, dtype="bfloat16")
    assert json.loads((both / "config.json").read_text())["dtype"] == "bfloat16"
    again = demix_jax.from_pretrained(one, tmp_path / "run", ["a", "b"])
    assert again.experts == ("a", "b")
    text = "the court held"
    expected = lm.with_experts("law").score(text).token_logprobs
    found = again.with_experts("a").score(text).token_logprobs
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(DemixError, match="has experts law, med, code, news: name one"):
        lm.save_pretrained(tmp_path / "none")


def test_a_merge_is_the_weighted_average(tmp_path, run):
    weights = {"law": 0.7, "med": 0.3, "code": 0.0}
    found = read_tensors(export_model(run, tmp_path / "out", weights=weights))
    for layer in range(2):
        law, med = (array(run, f"expert.{name}").reshape(2, 16, 64) for name in ("law", "med"))
        expected = 0.7 * law[layer].astype(np.float64) + 0.3 * med[layer].astype(np.float64)
        name = f"transformer.h.{layer}.mlp.c_fc.weight"
        np.testing.assert_array_equal(found[name], expected.astype(np.float32))
    assert "law" in (tmp_path / "out" / "README.md").read_text()


def test_experts_of_another_run_are_merged_under_one_trunk(tmp_path, run):
    same = make_run(tmp_path / "same", ("chat",), seed=5)
    other = make_run(tmp_path / "other", ("chat",), trunk=3)
    weights = {"law": 0.5, f"{same}:chat": 0.5}
    found = read_tensors(export_model(run, tmp_path / "out", weights=weights))
    law = array(run, "expert.law").reshape(2, 16, 64)[0].astype(np.float64)
    chat = array(same, "expert.chat").reshape(2, 16, 64)[0].astype(np.float64)
    expected = (0.5 * law + 0.5 * chat).astype(np.float32)
    np.testing.assert_array_equal(found["transformer.h.0.mlp.c_fc.weight"], expected)
    with pytest.raises(DemixError, match=r"other:chat cannot be merged .* its trunk is"):
        export_model(run, tmp_path / "no", weights={"law": 0.5, f"{other}:chat": 0.5})


@pytest.mark.slow
def test_every_row_of_the_split_is_exported(tmp_path):
    for row in ("ffn+embeddings", "all"):
        with case(row):
            workdir = make_run(tmp_path / row, ("law", "med"), expert_owns=row)
            found = read_tensors(export_model(workdir, tmp_path / f"{row}-out", expert="med"))
            item = "expert.med"
            leaf = "layers.ffn.down.kernel"
            expected = array(workdir, item, leaf).reshape(2, 64, 16)
            np.testing.assert_array_equal(found["transformer.h.1.mlp.c_proj.weight"], expected[1])
            assert len(found) == 28


@pytest.mark.slow
def test_an_output_bias_has_no_place_unless_it_is_zero(tmp_path):
    workdir = make_run(tmp_path / "run", ("law",), expert_owns="ffn+bias")
    with pytest.raises(DemixError, match=r"ffn\+bias have a bias of their logits, which no class"):
        export_model(workdir, tmp_path / "out", expert="law")
    narrow = make_run(tmp_path / "narrow", ("law", "med"))
    widen_experts(narrow, "ffn+bias")  # the bias begins as zeros
    export_model(narrow, tmp_path / "out", expert="law")
    assert "bias of the logits is zero" in (tmp_path / "out" / "README.md").read_text()


def test_what_cannot_be_exported_is_named(tmp_path, run):
    dense = make_run(tmp_path / "dense", ("dense",), variant="dense_balanced")
    labelled = make_run(tmp_path / "labelled", ("dense",), variant="domain_token")
    (tmp_path / "there").mkdir()
    cases = (
        (run, {"expert": "lwa"}, "has no expert 'lwa'; did you mean 'law'"),
        (run, {}, "has experts law, med, code, news: name one"),
        (run, {"weights": {"law": 0.5, "med": 0.4}}, "sum to 0.9"),
        (run, {"weights": {"law": 0.5, "mad": 0.5}}, "has no expert 'mad'"),
        (run, {"expert": "law", "weights": {"law": 1.0}}, "not both"),
        (run, {"expert": "law", "dtype": "int8"}, "dtype 'int8'; use float32"),
        (dense, {"expert": "law"}, "is a dense run: it has no experts"),
        (labelled, {}, "domain_token run: its texts begin with a domain's token"),
        (tmp_path / "none", {}, "holds no run"),
    )
    for workdir, options, message in cases:
        with case(message), pytest.raises(DemixError, match=message):
            export_model(workdir, tmp_path / "out", **options)
    with pytest.raises(DemixError, match="there exists; choose another --out"):
        export_model(run, tmp_path / "there", expert="law")
    assert not (tmp_path / "out").exists()


def test_damaged_numbers_are_not_exported(tmp_path, run):
    workdir = shutil.copytree(run, tmp_path / "run")
    step = workdir / "checkpoints" / str(meta_of(run)["step"])
    file = step / "expert.law" / "layers.ffn.up.kernel" / "0.0.0"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    with pytest.raises(DemixError, match="item 'expert.law' .* was altered"):
        export_model(workdir, tmp_path / "out", expert="law")
    export_model(workdir, tmp_path / "out", expert="med")


def test_tokenizers_give_the_same_ids_elsewhere(tmp_path):
    texts = [*TEXTS, *(any_characters(i, 200) for i in range(10))]
    made, ties = make_tokenizer(ByteTokenizer(), None, texts)
    assert ties == 0
    assert made.encode("ab").ids == [256, 97, 98]
    path = tmp_path / "ours.model"
    train_sentencepiece(generated(0, 300) + list(HARD.values()), 600, path)
    tokenizer = SentencePieceTokenizer(path)
    made, ties = make_tokenizer(tokenizer, path, texts)
    assert ties < 1e-3
    ids = made.encode("ab  c\n").ids
    assert ids[0] == tokenizer.eod
    assert made.decode(ids) == "ab  c\n"


def test_a_unigram_token_that_loses_to_its_characters_ends_documents(tmp_path):
    from tokenizers import AddedToken, Tokenizer, models

    path = tmp_path / "tokenizer.json"
    for score in (-1e6, -1.0):
        pieces = [("<unk>", -1e6), ("</s>", score), *((c, -3.0) for c in "</s>ab")]
        made = Tokenizer(models.Unigram(pieces, 0))
        made.add_special_tokens([AddedToken("</s>", normalized=False, special=True)])
        made.save(str(path))
        if score == -1.0:
            with pytest.raises(DemixError, match="text can spell it"):
                HuggingFaceTokenizer(path, "</s>")
            continue
        tokenizer = HuggingFaceTokenizer(path, "</s>")
        assert tokenizer.eod == 1
        assert 1 not in tokenizer.encode_batch(["a</s>b"])[0]


def test_a_tokenizer_without_counterpart_is_refused(tmp_path):
    import sentencepiece

    path = tmp_path / "words.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(generated(0, 200)), model_writer=file, vocab_size=100,
            model_type="word", minloglevel=2,
        )  # fmt: skip
    with pytest.raises(DemixError, match="model of words or characters, which tokenizer.json has"):
        make_tokenizer(SentencePieceTokenizer(path), path)


def test_a_tokenizer_of_a_run_is_known_by_its_folder(tmp_path, run):
    one = save_tokenizer(run, tmp_path / "one", {})
    two = save_tokenizer(tmp_path / "one", tmp_path / "two", {})
    assert one.hash == two.hash == load_run(run).tokenizer.hash
    assert json.loads((tmp_path / "two" / "tokenizer_meta.json").read_text())["kind"] == "bytes"
