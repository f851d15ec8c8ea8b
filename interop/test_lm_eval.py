"""`demix lm-eval` with the real lm-evaluation-harness, on tasks of local files."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import sentences

import demix_jax as demix
from demix_jax.errors import DemixError
from demix_jax.evaluation.score_texts import score_file
from demix_jax.harness.adapter import MixtureLM
from demix_jax.harness.settings import Settings
from demix_jax.harness.tasks import evaluate_tasks

ROOT = Path(__file__).parent.parent
MIXTURES = [
    {},
    {"switch_rate": 0.1, "top_k_experts": 2},
    {"prior": "cached:med"},
    {"prior": "updating"},
]
METRICS = "[{metric: %s, aggregation: %s, higher_is_better: true}]"
TASKS = {
    "tiny_choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
fewshot_split: test
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "tiny_last_word": f"""
output_type: loglikelihood
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{greedy}}}}"
target_delimiter: ""
metric_list: {METRICS % ("perplexity", "perplexity")}
""",
    "tiny_text": f"""
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: {METRICS % ("byte_perplexity", "weighted_perplexity")}
""",
    "tiny_writing": """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{greedy}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12}
metric_list: [{metric: exact_match}]
""",
}


def documents(lm) -> list[dict]:
    """Questions with two endings; texts, some beyond the context; and what the mixture writes."""
    made = []
    for i, (domain, other) in enumerate([("law", "med"), ("med", "code"), ("code", "law")] * 4):
        words = sentences(domain, 1, seed=100 + i)[0].split()
        choices = [sentences(domain, 1, 200 + i)[0][:14], sentences(other, 1, 300 + i)[0][: 9 + i]]
        prompt = " ".join(words[:4])
        greedy = lm.generate(prompt, max_tokens=12, temperature=0.0).text
        if i % 3 == 2:  # not what the mixture would have written
            greedy = greedy[:-1] + "~"
        made.append(
            {
                "question": " ".join(words[:5])[:40],
                "choices": choices[:: -1 if i % 2 else 1],
                "answer": i % 2,
                "prompt": prompt,
                "greedy": greedy,
                "text": " ".join(words) * (1 + i % 3),
            }
        )
    return made


@pytest.fixture(scope="module")
def lm(workdir):
    return demix.load(workdir)


@pytest.fixture(scope="module")
def docs(lm) -> list[dict]:
    return documents(lm)


@pytest.fixture(scope="module")
def folder(docs, tmp_path_factory) -> Path:
    """Task files, and the documents that they read."""
    made = tmp_path_factory.mktemp("tasks")
    (made / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    head = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {made}/docs.jsonl}}}}\n"
    for name, text in TASKS.items():
        (made / f"{name}.yaml").write_text(f"task: {name}\n{head}test_split: test\n{text}")
    return made


def by_mixture(lm, context: str, continuation: str, **options) -> float:
    """Log-probability of a continuation, from the scores of the whole text."""
    (line,) = lm.score([context + continuation], **options).mixture_logprobs
    return float(line[len(context.encode()) :].sum(dtype=np.float64))


def test_the_command_evaluates_tasks_of_all_kinds(lm, docs, folder, workdir, tmp_path):
    output = tmp_path / "results.json"
    command = [sys.executable, "-m", "demix_jax", "lm-eval", f"--workdir={workdir}"]
    command += [f"--include_path={folder}", "--tasks=tiny_*", f"--output={output}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    written = json.loads(output.read_text())
    results = written["results"]
    for name in TASKS:
        assert f"|{name}" in done.stdout

    right, right_by_length = [], []
    for doc in docs:
        sums = np.array([by_mixture(lm, doc["question"], f" {c}") for c in doc["choices"]])
        sizes = np.array([len(choice) for choice in doc["choices"]])
        right.append(sums.argmax() == doc["answer"])
        right_by_length.append((sums / sizes).argmax() == doc["answer"])
    assert 0 < np.mean(right) <= 1
    assert results["tiny_choice"]["acc,none"] == pytest.approx(np.mean(right))
    assert results["tiny_choice"]["acc_norm,none"] == pytest.approx(np.mean(right_by_length))

    ends = [by_mixture(lm, doc["prompt"], doc["greedy"]) for doc in docs]
    perplexity = results["tiny_last_word"]["perplexity,none"]
    assert perplexity == pytest.approx(np.exp(-np.mean(ends)), rel=1e-5)

    nats = [float(lm.score([doc["text"]]).mixture_logprobs.sum(dtype=float)) for doc in docs]
    sizes = [len(doc["text"].encode()) for doc in docs]
    found = results["tiny_text"]["byte_perplexity,none"]
    assert found == pytest.approx(np.exp(-np.sum(nats) / np.sum(sizes)), rel=1e-5)
    assert results["tiny_writing"]["exact_match,none"] == pytest.approx(8 / 12)

    about = written["config"]
    assert (about["model"], about["model_args"]["experts"]) == ("demix", ["law", "med", "code"])
    assert about["model_args"]["workdir"] == str(workdir)


def test_one_expert_a_prior_and_examples(lm, docs, folder, workdir):
    options = {"tasks": ("tiny_choice",), "include_path": str(folder), "limit": 6}
    law = lm.with_experts(["law"])
    right = []
    for doc in docs[:6]:
        sums = [by_mixture(law, doc["question"], f" {choice}") for choice in doc["choices"]]
        right.append(np.argmax(sums) == doc["answer"])
    found = evaluate_tasks(workdir, Settings(**options, expert="law"))
    assert found["results"]["tiny_choice"]["acc,none"] == pytest.approx(np.mean(right))
    assert found["n-samples"]["tiny_choice"]["effective"] == 6

    found = evaluate_tasks(workdir, Settings(**options, prior="cached:med", num_fewshot=1))
    assert found["n-shot"]["tiny_choice"] == 1
    assert found["config"]["model_args"]["switch_rate"] == 0.01
    assert found["config"]["outgrown"]["loglikelihood"] > 0  # of 64 tokens


def requests(*arguments: tuple) -> list:
    return [SimpleNamespace(args=each) for each in arguments]


@pytest.mark.parametrize("options", [*MIXTURES, {"expert": "code"}], ids=str)
def test_rolling_likelihood_is_that_of_demix_score(options, docs, workdir, tmp_path):
    """Each text by itself, also those of several windows; and what has no tokens."""
    texts = [doc["text"] for doc in docs[:6]] + ["x"]
    found = MixtureLM(workdir, Settings(**options)).loglikelihood_rolling(
        requests(*((text,) for text in [*texts, ""]))
    )
    if "expert" in options:
        lm = demix.load(workdir, experts=["code"])
        expected = [lm.score([text]).mixture_logprobs.sum(dtype=float) for text in texts]
    else:
        given = {"top_k" if k == "top_k_experts" else k: v for k, v in options.items()}
        expected = []
        for text in texts:
            (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}))
            scores = score_file(workdir, tmp_path / "t.jsonl", tmp_path / "s.npz", **given)
            expected.append(scores.mixture_logprobs.sum(dtype=np.float64))
    np.testing.assert_allclose(found, [*expected, 0.0], rtol=1e-5)


def test_contexts_condition_the_posterior(lm, workdir):
    """Trailing spaces go to the continuation; an empty context is the document token."""
    pairs = [
        ("court appeal judge ", "statute"),
        ("court appeal judge", " statute"),
        ("", "patient dose"),
        ("def return self", " import"),
        ("court", ""),
    ]
    for options in MIXTURES[:3]:
        model = MixtureLM(workdir, Settings(**options))
        found = model.loglikelihood(requests(*pairs))
        for (context, continuation), (logprob, _) in zip(pairs, found, strict=True):
            kept = context.rstrip()
            rest = context[len(kept) :] + continuation
            expected = by_mixture(lm, kept, rest, **options)
            assert logprob == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert found[0] == found[1]
    prior_alone = by_mixture(lm, *pairs[1], prior="cached:med", switch_rate=1.0)
    assert found[1][0] > prior_alone + 0.1, "the context speaks for law, the prior for med"
    assert not model.outgrown["loglikelihood"]


def test_a_context_that_is_too_long_loses_its_beginning(lm, workdir):
    """The newest 64 tokens stay, under the prior, and no document token is before them."""
    model = MixtureLM(workdir, Settings(expert="law"))
    long = " ".join(sentences("law", 9, seed=5)).strip()
    found = model.loglikelihood(requests((long, " held"), (long[-30:], " held")))
    assert model.outgrown == Counter(loglikelihood=1)
    tokens = np.frombuffer((long + " held")[-65:].encode(), np.uint8).astype(np.int32)[None]
    scorer = lm._store.scorer(["law"])
    by_law = scorer.logprobs(tokens, np.ones((1, 64), bool), label="text", names=["law"])
    assert found[0][0] == pytest.approx(by_law[0, 0, -5:].sum(), rel=1e-5)


def test_greedy_is_of_the_mixture(lm, docs, workdir):
    model = MixtureLM(workdir)
    pairs = [(doc["prompt"], doc["greedy"]) for doc in docs]
    found = model.loglikelihood(requests(*pairs))
    assert [greedy for _, greedy in found] == [i % 3 != 2 for i in range(12)]


def test_generation_until(lm, workdir):
    model = MixtureLM(workdir, Settings(batch_size=2))
    prompts = ["court appeal", "patient dose", "", "court appeal"]
    greedy = {"until": ["\n"], "max_gen_toks": 20}
    found = model.generate_until(requests(*((prompt, greedy) for prompt in prompts)))
    for prompt, text in zip(prompts, found, strict=True):
        if prompt:
            made = lm.generate(prompt, max_tokens=20, temperature=0.0, stop="\n")
            assert text == made.text
    assert found[2]
    assert found[0] == found[3]

    stop = found[0][3:5]
    cut = {"until": stop, "max_gen_toks": 20, "temperature": 0.0, "num_beams": 1}
    assert model.generate_until(requests(("court appeal", cut))) == [found[0].split(stop)[0]]
    drawn = {"until": [], "max_gen_toks": 20, "do_sample": True, "temperature": 1.0, "top_p": 0.9}
    texts = model.generate_until(requests(*[("court appeal", drawn)] * 3))
    assert len(set(texts)) == 3, "a request that is repeated draws anew"
    assert texts == model.generate_until(requests(*[("court appeal", drawn)] * 3))
    assert not model.outgrown["generate_until"]
    long = " ".join(sentences("law", 9, seed=5)).strip()
    made = lm.generate(long, max_tokens=20, temperature=0.0, slide=True)
    assert model.generate_until(requests((long, {"max_gen_toks": 20}))) == [made.text]
    assert model.outgrown["generate_until"] == 1


def test_bad_input_is_one_line(folder, workdir):
    tasks = {"tasks": ("tiny_choice",), "include_path": str(folder)}
    for options, message in (
        ({"tasks": ("tiny_chose",)}, r"unknown task 'tiny_chose'; did you mean 'tiny_choice'\?"),
        ({"expert": "lew"}, r"has no expert 'lew'; did you mean 'law'\?"),
        ({"prior": "even"}, "unknown prior 'even'"),
        ({"top_k_experts": 4}, "top_k 4 cannot be kept of 3 experts"),
        ({"include_path": str(folder / "none")}, "none is no folder"),
    ):
        with pytest.raises(DemixError, match=message) as error:
            evaluate_tasks(workdir, Settings(**tasks | options))
        assert "\n" not in str(error.value)
    model = MixtureLM(workdir)
    for option, message in (
        ({"num_beams": 4}, "there is no beam search"),
        ({"typical_p": 0.5}, "generation option typical_p"),
        ({"max_gen_toks": 0}, "max_tokens must be 1 or more"),
    ):
        with pytest.raises(DemixError, match=message):
            model.generate_until(requests(("court", option)))
    with pytest.raises(DemixError, match="has no chat template"):
        model.apply_chat_template([{"role": "user", "content": "hi"}])


def test_a_task_whose_data_is_not_there_is_named(folder, workdir, tmp_path):
    text = (folder / "tiny_choice.yaml").read_text().replace("docs.jsonl", "lost.jsonl")
    (tmp_path / "tiny_lost.yaml").write_text(text.replace("task: tiny_choice", "task: tiny_lost"))
    settings = Settings(tasks=("tiny_lost",), include_path=str(tmp_path))
    with pytest.raises(DemixError, match="cannot load tiny_lost: "):
        evaluate_tasks(workdir, settings)
