"""`demix serve` over a real socket: its answers are those of `lm.generate` and `lm.score`."""

import concurrent.futures
import itertools
import json
import random
import shutil

import jax
import numpy as np
import pytest
from edits import make_run
from serving import Server, events

import demix_jax as demix
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.evaluation.cached_priors import CachedPrior, save_prior
from demix_jax.experts.lifecycle import remove_experts, rename_experts
from demix_jax.model.loss import logits
from demix_jax.model.params import join
from demix_jax.model.transformer import hidden_states

EXPERTS = ("law", "med", "code")
KEY = "k" * 32
BOUNDS = ("--batch_size=2", "--max_queue=4", "--max_choices=4", "--expert_sets=2")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = make_run(tmp_path_factory.mktemp("served") / "run", EXPERTS, context=128)
    newest = load_run(folder).latest()
    prior = CachedPrior("med", EXPERTS, (0.2, 0.7, 0.1), 0.1, 0, 9, newest.params_hash)
    save_prior(folder, prior)
    return folder


@pytest.fixture(scope="module")
def lm(workdir, tmp_path_factory):
    """The run as it was before any edit."""
    copy = tmp_path_factory.mktemp("copied") / "run"
    shutil.copytree(workdir, copy)
    return demix.load(copy)


@pytest.fixture(scope="module")
def server(workdir, tmp_path_factory):
    key = tmp_path_factory.mktemp("key") / "key"
    key.write_text(KEY + "\n")
    key.chmod(0o600)
    bounds = (*BOUNDS, "--max_body_kb=64", "--body_timeout=0.5", "--nowarm_up")
    made = Server(workdir, f"--api_key_file={key}", *bounds, key=KEY)
    yield made
    status, said = made.end()
    assert (status, said) == (0, "stopping: requests under way are finished\n")


def test_models_are_the_mixture_and_its_experts(server):
    found = server.request("GET", "/v1/models").body
    assert [model["id"] for model in found["data"]] == ["demix", *(f"demix:{n}" for n in EXPERTS)]
    assert [model["parent"] for model in found["data"]] == [None, "demix", "demix", "demix"]
    assert found["data"][0]["experts"] == list(EXPERTS)
    assert found["data"][0]["priors"] == ["med"]
    assert found["workdir_differs"] is None
    assert server.request("GET", "/v1/models/demix:med").body == found["data"][2]


OPTIONS = [
    ({}, {}),
    ({"temperature": 0.7, "top_p": 0.8}, {}),
    ({"temperature": 0}, {"switch_rate": 0.1}),
    ({}, {"prior": "cached:med", "top_k_experts": 2}),
    ({}, {"prior": "updating"}),
    ({"model": "demix:med"}, {}),
    ({}, {"experts": ["code", "law"]}),
]


@pytest.mark.parametrize(("fields", "own"), OPTIONS)
def test_texts_are_those_of_generate_streamed_or_not(server, lm, fields, own):
    asked = {"prompt": "court dose", "max_tokens": 12, "seed": 5} | fields | {"demix": own}
    found = server.complete(**asked)
    (choice,) = found["choices"]
    options = {k: v for k, v in (asked | own).items() if k not in ("prompt", "model", "demix")}
    view = lm
    if "experts" in own:
        view = lm.with_experts(["law", "code"])
    if "model" in fields:
        view = lm.with_experts(["med"])
    options.pop("experts", None)
    made = view.generate("court dose", **options)
    assert choice["text"] == made.text
    assert found["usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 12,
        "total_tokens": 22,
    }
    assert choice["finish_reason"] == "length"
    assert tuple(choice["demix"]["experts"]) == made.experts
    assert "".join(choice["demix"]["pieces"]) == made.text
    np.testing.assert_allclose(choice["demix"]["posterior"], made.posterior[10:], atol=2e-4)

    streamed = server.complete(**asked, stream=True, stream_options={"include_usage": True})
    parts = [event["choices"][0] for event in streamed[:-1]]
    assert "".join(part["text"] for part in parts) == made.text
    assert [part["finish_reason"] for part in parts] == [None] * 11 + ["length"]
    weights = [row for part in parts for row in part["demix"]["posterior"]]
    np.testing.assert_allclose(weights, made.posterior[10:], atol=2e-4)
    assert streamed[-1]["usage"] == found["usage"]
    assert {event["system_fingerprint"] for event in streamed} == {found["system_fingerprint"]}


def test_prompts_may_be_many_and_be_tokens(server):
    asked = {"max_tokens": 8, "seed": 3}
    alone = [server.complete(prompt=prompt, **asked)["choices"][0] for prompt in ("ab", "dose")]
    ids = [list(b"ab"), list(b"dose")]
    for prompts in (["ab", "dose"], ids):
        found = server.complete(prompt=prompts, **asked)
        assert [choice["text"] for choice in found["choices"]] == [one["text"] for one in alone]
        assert [choice["index"] for choice in found["choices"]] == [0, 1]
        assert found["usage"]["prompt_tokens"] == 6
    for same in (ids[0], [256, *ids[0]]):  # the document's token, which stands first anyway
        assert server.complete(prompt=same, **asked)["choices"][0]["text"] == alone[0]["text"]


def test_choices_have_draws_of_their_own(server):
    asked = {"prompt": ["ab", "c"], "max_tokens": 10, "seed": 3, "temperature": 2}
    several = server.complete(n=2, **asked)
    texts = [choice["text"] for choice in several["choices"]]
    assert len(set(texts)) == 4
    assert texts[::2] == [choice["text"] for choice in server.complete(**asked)["choices"]]
    assert (several["usage"]["prompt_tokens"], several["usage"]["completion_tokens"]) == (3, 40)
    streamed = server.complete(n=2, stream=True, **asked)
    for i, text in enumerate(texts):
        parts = [event["choices"][0] for event in streamed if event["choices"][0]["index"] == i]
        assert "".join(part["text"] for part in parts) == text
    unseeded = [server.complete(prompt="ab", max_tokens=10)["choices"][0]["text"] for _ in "12"]
    assert unseeded[0] != unseeded[1]


def test_a_stop_string_ends_a_text(server, lm):
    asked = {"prompt": "ab", "max_tokens": 40, "seed": 1, "temperature": 0}
    text = server.complete(**asked)["choices"][0]["text"]
    stop = text[5:8]
    expected = lm.generate("ab", max_tokens=40, seed=1, temperature=0.0, stop=stop)
    for given in (stop, ["never there", stop]):
        (choice,) = server.complete(stop=given, **asked)["choices"]
        assert (choice["text"], choice["finish_reason"]) == (expected.text, "stop")
        assert stop not in choice["text"]
        streamed = server.complete(stop=given, stream=True, **asked)
        assert "".join(event["choices"][0]["text"] for event in streamed) == expected.text


def test_echo_gives_the_scores_of_a_prompt(server, lm):
    text = "patient dose of court"
    scores = lm.score(text, switch_rate=0.05)
    for max_tokens, stream in itertools.product((0, 1), (False, True)):
        found = server.complete(
            prompt=list(text.encode()),
            max_tokens=max_tokens,
            echo=True,
            logprobs=1,
            temperature=0,
            stream=stream,
            demix={"switch_rate": 0.05},
        )
        choice = found[0]["choices"][0] if stream else found["choices"][0]
        values = choice["logprobs"]
        size = len(text)
        if stream:
            assert choice["text"] == text
            assert len(found) == 1 + max_tokens
        else:
            assert len(values["tokens"]) == size + max_tokens
            assert choice["text"].startswith(text)
        np.testing.assert_allclose(
            values["token_logprobs"][:size], scores.mixture_logprobs[0], atol=2e-4
        )
        np.testing.assert_allclose(
            choice["demix"]["posterior"][:size], scores.posterior[0], atol=2e-4
        )
        assert values["tokens"][:size] == list(text)
        assert values["text_offset"][:size] == list(range(size))
    given = server.complete(prompt=[256, *b"ab"], max_tokens=0, echo=True, logprobs=1)["choices"][0]
    assert given["logprobs"]["token_logprobs"][0] is given["logprobs"]["top_logprobs"][0] is None
    assert given["logprobs"]["tokens"] == ["token_id:256", "a", "b"]
    assert len(given["demix"]["posterior"]) == 3


def test_the_most_probable_tokens_are_those_of_the_mixture(server, lm):
    """Against all experts' distributions, computed at once, at every place of prompt and text."""
    text = "dose trial court"
    (choice,) = server.complete(
        prompt=text, max_tokens=6, temperature=0, echo=True, logprobs=5, seed=1
    )["choices"]
    shared, trees = lm._store.weights.load(lm.experts)
    made = lm.generate(text, max_tokens=6, temperature=0.0, seed=1)
    tokens = np.array([[256, *made.tokens[:-1]]], np.int32)
    by_expert = []
    for tree in trees:
        whole = join(shared, tree)
        states = hidden_states(lm._run.model, whole, tokens)
        by_expert.append(jax.nn.log_softmax(logits(lm._run.model, whole, states)[0]))
    weights = np.log(made.posterior.astype(np.float64))[:, :, None]
    mixture = np.logaddexp.reduce(weights + np.moveaxis(np.array(by_expert), 0, 1), axis=1)
    for place, found in enumerate(choice["logprobs"]["top_logprobs"]):
        largest = np.sort(mixture[place])[::-1]
        values = list(found.values())
        assert values == sorted(values, reverse=True)
        assert len(values) in (5, 6)  # and the token that stands there
        np.testing.assert_allclose(values[:5], largest[:5], atol=2e-4)
        greedy = choice["logprobs"]["token_logprobs"][place] == max(values)
        assert greedy == (mixture[place].argmax() == made.tokens[place])
    assert all(
        value == max(found.values())
        for value, found in zip(
            choice["logprobs"]["token_logprobs"][-6:],
            choice["logprobs"]["top_logprobs"][-6:],
            strict=True,
        )
    )


def test_requests_that_arrive_together_are_answered_as_if_alone(server):
    asked = [
        {"prompt": f"{word} x", "max_tokens": 15, "seed": i, "model": model}
        for i, (word, model) in enumerate(
            itertools.product(("a", "court", "dose"), ("demix", "demix:law", "demix:code"))
        )
    ]

    def ask(fields):
        while True:
            reply = server.request("POST", "/v1/completions", fields)
            if reply.status != 429:
                return reply.body["choices"][0]["text"]

    alone = [ask(fields) for fields in asked]
    with concurrent.futures.ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(ask, asked)) == alone
    assert server.until_idle()["engines"] <= 2


def test_a_full_queue_refuses_and_recovers(server):
    fields = {"model": "demix", "prompt": "ab", "max_tokens": 100, "n": 4}
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        replies = list(
            pool.map(lambda _: server.request("POST", "/v1/completions", fields), range(8))
        )
    refused = [reply for reply in replies if reply.status == 429]
    assert {reply.status for reply in replies} == {200, 429}
    assert refused[0].headers["retry-after"] == "1"
    assert refused[0].body["error"]["code"] == "queue_full"
    server.until_idle()
    server.complete(prompt="ab", max_tokens=1)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_rows(server, stream):
    before = server.until_idle()["generated_tokens"]
    fields = {"prompt": "ab", "max_tokens": 120, "n": 4, "temperature": 0, "stream": stream}
    if stream:
        with server.streaming(**fields) as answer:
            assert answer.readline().startswith(b"data: ")
    else:
        connection = server.connect()
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        body = json.dumps({"model": "demix"} | fields)
        connection.request("POST", "/v1/completions", body, headers)
        while server.health()["generated_tokens"] == before:
            pass
        connection.sock.close()
    assert server.until_idle()["generated_tokens"] - before < 4 * 120


def test_experts_come_and_go_under_requests(server, workdir, lm):
    asked = {"prompt": "court dose", "max_tokens": 100, "seed": 2}
    whole = server.complete(**asked)
    with server.streaming(**asked) as answer:
        first = answer.readline()
        reply = server.request("POST", "/v1/experts/unload", {"name": "med"})
        assert reply.body == {"id": "demix:med", "object": "model", "deleted": True}
        assert server.request("GET", "/v1/models/demix:med").status == 404
        without = server.complete(**asked)
        rest = answer.read()
    found = events(first + rest)
    assert "".join(event["choices"][0]["text"] for event in found) == whole["choices"][0]["text"]
    assert without["choices"][0]["demix"]["experts"] == ["law", "code"]
    assert without["system_fingerprint"] != whole["system_fingerprint"]
    view = lm.with_experts(["law", "code"])
    assert without["choices"][0]["text"] == view.generate("court dose", max_tokens=100, seed=2).text
    for name in ("med", "med"):  # again changes nothing
        assert server.request("POST", "/v1/experts/load", {"name": name}).body["id"] == "demix:med"
    assert server.complete(**asked)["choices"] == whole["choices"]


@pytest.mark.slow
def test_an_edit_of_the_folder_is_told_and_changes_nothing(workdir, lm, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(workdir, folder)
    server = Server(folder, *BOUNDS, "--nowarm_up")
    try:
        asked = {"prompt": "ab", "max_tokens": 5, "seed": 1, "demix": {"prior": "cached:med"}}
        before = server.complete(**asked)["choices"]
        remove_experts(folder, ["law"], scan=False)
        rename_experts(folder, {"code": "program"})
        differs = "not in the folder any more, but served: law, code; in the folder, but not served"
        assert server.health()["workdir_differs"].startswith(differs)
        assert server.request("GET", "/v1/models").body["workdir_differs"].endswith(": program")
        assert server.complete(**asked)["choices"] == before
        assert server.request("POST", "/v1/experts/unload", {"name": "law"}).status == 200
        reply = server.request("POST", "/v1/experts/load", {"name": "law"})
        assert (reply.status, reply.body["error"]["code"]) == (400, None)
        assert "has no expert 'law' (experts: med, program)" in reply.body["error"]["message"]
        found = server.request("POST", "/v1/experts/load", {"name": "program"}).body
        assert found["experts"] == ["program"]
        programs = [
            server.complete(prompt="ab", max_tokens=5, seed=1, model=f"demix:{name}")
            for name in ("code", "program")
        ]
        assert programs[0]["choices"][0]["text"] == programs[1]["choices"][0]["text"]
        other = make_run(tmp_path / "other", EXPERTS, trunk=7, context=128)
        shutil.rmtree(folder / "checkpoints")
        shutil.copytree(other / "checkpoints", folder / "checkpoints")
        reply = server.request("POST", "/v1/experts/load", {"name": "law"})
        assert (reply.status, reply.body["error"]["code"]) == (409, "other_trunk")
        assert "another trunk" in server.health()["workdir_differs"]
        with server.streaming(prompt="ab", max_tokens=100) as answer:
            first = answer.readline()
            status, said = server.end()
            found = events(first + answer.read())
        assert found[-1]["choices"][0]["finish_reason"] in ("length", "stop")
        assert (status, said) == (0, "stopping: requests under way are finished\n")
    finally:
        server.process.kill()


def test_random_bodies_are_answered_and_never_break_the_server(server):
    rng = random.Random(0)
    names = ["model", "prompt", "max_tokens", "temperature", "top_p", "stop", "seed", "n", "stream"]
    names += ["logprobs", "echo", "demix", "best_of", "user", "logit_bias", "stream_options", "x"]

    def value(depth=0):
        simple = [None, True, False, 0, 1, 2, -1, 10**30, 0.5, 1e308, "", "demix", "a", "\ud800"]
        if depth < 3 and rng.random() < 0.3:
            if rng.random() < 0.5:
                return [value(depth + 1) for _ in range(rng.randrange(4))]
            inner = ["experts", "prior", "switch_rate", "top_k_experts", "include_usage"]
            return {rng.choice(inner): value(depth + 1) for _ in range(rng.randrange(3))}
        return rng.choice(simple)

    statuses = set()
    for _ in range(200):
        body = {name: value() for name in rng.sample(names, rng.randrange(6))}
        if rng.random() < 0.8:
            body |= {"model": "demix", "prompt": "a", "max_tokens": rng.choice([1, 2, None])}
        statuses.add(server.request("POST", "/v1/completions", body).status)
    assert statuses <= {200, 400, 404}
    assert statuses >= {200, 400}
    assert server.until_idle()["status"] == "ok"
