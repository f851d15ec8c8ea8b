"""A served run, asked by the official client and by lm-evaluation-harness's own."""

import json
from types import SimpleNamespace

import numpy as np
import openai
import pytest
from servers import serving

import demix_jax as demix
from demix_jax.harness.adapter import MixtureLM

PROMPT = "court appeal judge"


@pytest.fixture(scope="module")
def lm(pieces_workdir):
    return demix.load(pieces_workdir)


@pytest.fixture(scope="module")
def url(pieces_workdir):
    with serving(pieces_workdir, "--nowarm_up") as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


def complete(client: openai.OpenAI, prompt=PROMPT, **options):
    options = {"model": "demix", "max_tokens": 8, "temperature": 0, "seed": 1} | options
    return client.completions.create(prompt=prompt, **options)


def tokens_of(lm, text: str) -> list[int]:
    return lm._run.tokenizer.encode_batch([text])[0].tolist()


def test_models_are_the_mixture_and_the_experts(client, lm):
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["demix", *(f"demix:{name}" for name in lm.experts)]
    assert {model.object for model in models.values()} == {"model"}
    assert models["demix:law"].parent == "demix"
    assert client.models.retrieve("demix:med") == models["demix:med"]


def test_greedy_text_is_that_of_the_library(client, lm):
    made = lm.generate(PROMPT, max_tokens=8, temperature=0.0)
    found = complete(client)
    (choice,) = found.choices
    assert (found.object, found.model) == ("text_completion", "demix")
    assert (choice.text, choice.index, choice.finish_reason) == (made.text, 0, "length")
    size = len(tokens_of(lm, PROMPT))
    assert found.usage.prompt_tokens in (size, size + 1)  # the document token may count
    assert found.usage.completion_tokens == 8
    assert found.usage.total_tokens == found.usage.prompt_tokens + 8

    alone = lm.generate(PROMPT, max_tokens=8, temperature=0.0, expert="code").text
    assert complete(client, model="demix:code").choices[0].text == alone != made.text


def test_prompts_of_all_forms(client, lm):
    prompts = [PROMPT, "patient dose", "def return self"]
    expected = [made.text for made in lm.generate(prompts, max_tokens=8, temperature=0.0)]
    ids = [tokens_of(lm, prompt) for prompt in prompts]
    for given in (prompts, ids):
        found = complete(client, given)
        assert [choice.index for choice in found.choices] == [0, 1, 2]
        assert [choice.text for choice in found.choices] == expected
    assert complete(client, ids[1]).choices[0].text == expected[1]


def test_a_stream_adds_up_to_the_text(client):
    whole = complete(client, max_tokens=12, logprobs=0)
    parts = list(
        complete(
            client, max_tokens=12, logprobs=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert parts[-1].usage == whole.usage
    chosen = [part.choices[0] for part in parts if part.choices]
    assert len(chosen) > 1
    assert "".join(choice.text for choice in chosen) == whole.choices[0].text
    assert [choice.finish_reason for choice in chosen][-1] == "length"
    assert {choice.finish_reason for choice in chosen[:-1]} == {None}
    tokens = [token for choice in chosen for token in choice.logprobs.tokens]
    assert tokens == whole.choices[0].logprobs.tokens
    assert len({part.id for part in parts}) == 1


def test_a_stream_can_be_left(client):
    with complete(client, max_tokens=40, stream=True) as stream:
        next(iter(stream))
    assert complete(client).choices[0].text


def test_logprobs_are_those_of_the_mixture(client, lm):
    scores = lm.score([PROMPT])
    found = complete(client, echo=True, max_tokens=1, logprobs=3)
    (choice,) = found.choices
    size = len(tokens_of(lm, PROMPT))
    assert choice.text.startswith(PROMPT)
    given = choice.logprobs
    assert len(given.tokens) == len(given.token_logprobs) == len(given.text_offset) == size + 1
    assert "".join(given.tokens[:size]) == PROMPT
    for i, offset in enumerate(given.text_offset[:size]):
        assert PROMPT[offset:].startswith(given.tokens[i])
    np.testing.assert_allclose(given.token_logprobs[:size], scores.mixture_logprobs[0], atol=1e-4)
    for logprob, token, top in zip(
        given.token_logprobs, given.tokens, given.top_logprobs, strict=True
    ):
        assert 3 <= len(top) <= 4
        assert top[token] == pytest.approx(logprob)
        assert list(top.values()) == sorted(top.values(), reverse=True)
    alone = complete(client, echo=True, max_tokens=0, logprobs=1).choices[0]
    assert (alone.text, len(alone.logprobs.tokens)) == (PROMPT, size)
    posterior = np.array(choice.demix["posterior"])
    np.testing.assert_allclose(posterior[:size], scores.posterior[0], atol=1e-4)


def test_several_choices_differ_and_a_seed_repeats_them(client):
    options = {"n": 4, "temperature": 1.0, "max_tokens": 12, "top_p": 0.95}
    texts = [choice.text for choice in complete(client, **options).choices]
    assert len(set(texts)) > 1
    assert [choice.text for choice in complete(client, **options).choices] == texts
    assert [choice.text for choice in complete(client, **options, seed=2).choices] != texts


def test_stop_strings_end_a_text(client):
    text = complete(client).choices[0].text
    stop = text[3:5]
    for given in (stop, ["never", stop]):
        (choice,) = complete(client, stop=given).choices
        assert choice.finish_reason == "stop"
        assert choice.text == text.split(stop)[0]


def test_a_mixture_of_ones_own(client, lm):
    own = {"demix": {"experts": ["law", "code"], "switch_rate": 0.1}}
    found = complete(client, extra_body=own)
    law_code = lm.with_experts(["law", "code"])
    made = law_code.generate(PROMPT, max_tokens=8, temperature=0.0, switch_rate=0.1)
    assert found.choices[0].text == made.text
    assert sorted(found.choices[0].demix["experts"]) == ["code", "law"]


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"model": "demix:lew"}, openai.NotFoundError, "law"),
        ({"model": "gpt-2"}, openai.NotFoundError, "demix"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"top_p": 0}, openai.BadRequestError, "top_p"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens"),
        ({"prompt": "law " * 99}, openai.BadRequestError, "context"),
        ({"prompt": ""}, openai.BadRequestError, "empty"),
        ({"prompt": [99999]}, openai.BadRequestError, "99999"),
        ({"best_of": 3}, openai.BadRequestError, "best_of"),
        ({"extra_body": {"maxtokens": 3}}, openai.BadRequestError, "max_tokens"),
    ],
    ids=str,
)
def test_errors_are_the_clients_own(client, options, kind, says):
    with pytest.raises(kind, match=says) as error:
        complete(client, **options)
    assert {"message", "type", "param", "code"} <= set(error.value.body)


def test_a_key_is_asked_for(pieces_workdir, tmp_path):
    (tmp_path / "key").write_text("0123456789abcdef\n")
    (tmp_path / "key").chmod(0o600)
    with serving(pieces_workdir, f"--api_key_file={tmp_path / 'key'}", "--nowarm_up") as address:
        options = {"base_url": f"{address}/v1", "max_retries": 0, "timeout": 60}
        with (
            openai.OpenAI(api_key="wrong-key-0123456789", **options) as other,
            pytest.raises(openai.AuthenticationError, match="API key is wrong"),
        ):
            complete(other)
        with openai.OpenAI(api_key="0123456789abcdef", **options) as own:
            assert complete(own).choices[0].text


def requests(*arguments: tuple) -> list:
    return [SimpleNamespace(args=each, arguments=each) for each in arguments]


def harness_client(url: str, **options):
    """lm-evaluation-harness's model `local-completions`."""
    from lm_eval.api.registry import get_model

    settings = {"model": "demix", "base_url": f"{url}/completions", "max_length": 64}
    settings |= {"max_retries": 1, "num_concurrent": 2}
    return get_model("local-completions").create_from_arg_obj(settings | options)


PAIRS = [
    ("court appeal judge", " statute"),
    ("patient dose trial", " mg placebo"),
    ("def return", " court"),
    ("", "minister said"),
    ("court appeal ", "held"),
]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_harness_scores_a_served_run_as_ours(url, pieces_workdir, tokenizer_dir, batch_size):
    """Requests of token ids; its Hugging Face tokenizer is the run's."""
    model = harness_client(
        url,
        tokenizer=str(tokenizer_dir),
        tokenizer_backend="huggingface",
        tokenized_requests=True,
        batch_size=batch_size,
    )
    own = MixtureLM(pieces_workdir)
    found, expected = (each.loglikelihood(requests(*PAIRS)) for each in (model, own))
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], rtol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    texts = requests(("court appeal judge statute plaintiff held",), ("patient dose",))
    np.testing.assert_allclose(
        model.loglikelihood_rolling(texts), own.loglikelihood_rolling(texts), rtol=1e-4
    )


def test_the_harness_generates_from_a_served_run_as_ours(url, pieces_workdir):
    """Without a tokenizer, requests are texts."""
    model = harness_client(url, tokenizer_backend=None, tokenized_requests=False)
    arguments = {"until": ["\n"], "max_gen_toks": 10, "do_sample": False}
    asked = [(context, json.loads(json.dumps(arguments))) for context, _ in PAIRS[:3]]
    expected = MixtureLM(pieces_workdir).generate_until(requests(*asked))
    assert model.generate_until(requests(*asked)) == expected
