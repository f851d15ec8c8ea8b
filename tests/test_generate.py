"""The Python front and `demix generate`, on a run that is there already."""

import dataclasses
import functools
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from edits import make_run

import demix_jax as demix
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.cli.main import main
from demix_jax.errors import DemixError
from demix_jax.evaluation.cached_priors import CachedPrior, save_prior
from demix_jax.evaluation.score_texts import score_file
from demix_jax.generation.settings import Options, Settings
from demix_jax.generation.text_stream import Detokenizer, StopStrings, token_pieces
from demix_jax.generation.trace import colored
from demix_jax.model.params import join
from demix_jax.model.transformer import token_logprobs

ARCHIVE = Path(__file__).parent / "golden" / "before_rooms.tar.gz"
TEXTS = ["court dose", "x", "é漢字"]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    """Experts law and med, context 8, bytes; and a cached prior."""
    folder = tmp_path_factory.mktemp("golden")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    newest = load_run(folder / "run").latest()
    save_prior(
        folder / "run",
        CachedPrior("med", ("law", "med"), (0.2, 0.8), 0.1, 0, 9, newest.params_hash),
    )
    return folder / "run"


@pytest.fixture(scope="module")
def lm(workdir):
    return demix.load(workdir)


def test_the_front_is_imported_when_it_is_used():
    program = "import sys, demix_jax; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        demix.laod  # noqa: B018


def test_options_are_the_settings():
    fields = {f.name: f.type for f in dataclasses.fields(Settings)}
    assert Options.__annotations__ == fields


def test_scores_are_those_of_the_command(lm, workdir, tmp_path):
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for prior, options in (
        ("uniform", {"switch_rate": 0.2}),
        ("updating", {}),
        ("cached:med", {}),
        ("cached:med", {"top_k": 1}),
    ):
        expected = score_file(workdir, source, tmp_path / "s.npz", prior=prior, **options)
        top_k = {"top_k_experts": options.pop("top_k", 0)}
        found = lm.score(TEXTS, prior=prior, **options, **top_k)
        for name, values in vars(expected).items():
            np.testing.assert_array_equal(getattr(found, name), values, err_msg=f"{prior} {name}")
    assert lm.perplexity(TEXTS) == pytest.approx(np.exp(lm.score(TEXTS).nats_per_token))
    posterior = lm.posterior("court dose")
    assert "".join(posterior.pieces) == "court dose"
    assert posterior.weights.shape == (10, 2)
    assert sum(posterior.mean.values()) == pytest.approx(1)
    assert "10 tokens; mean: " in repr(posterior)


def test_generated_text_scores_as_it_was_generated(lm):
    """Log-probabilities and weights of prompt and text, scored whole; the context is eight."""
    for options in ({}, {"prior": "cached:med"}, {"prior": "cached:med", "top_k_experts": 1}):
        made = lm.generate("xy", max_tokens=6, temperature=0.01, **options)
        assert (made.finish, made.generated, len(made.tokens)) == ("length", 6, 8)
        text = bytes(made.tokens.tolist()).decode("ascii")
        assert "".join(made.pieces) == made.prompt + made.text == text
        scores = lm.score([text], **options)
        assert made.experts == tuple(scores.experts)
        np.testing.assert_allclose(made.logprobs, scores.mixture_logprobs[0], atol=1e-4)
        np.testing.assert_allclose(made.posterior, scores.posterior[0], atol=1e-4)


@pytest.mark.slow
def test_a_text_does_not_depend_on_its_batch(lm, capsys):
    prompts = ["a", "bc", "court", "d", "efghijk", "f", "g", "h"]
    options = {"max_tokens": 20, "slide": True, "seed": 5, "switch_rate": 0.1}
    together = lm.generate(prompts, **options)
    said = capsys.readouterr().err
    assert said.startswith("prompt 1, 2, 3, 4, 5, 6, 7, 8 with 20 tokens more may outgrow")
    alone = lm.generate(prompts, batch_size=1, **options)
    for one, other in zip(alone, together, strict=True):
        assert (one.text, one.tokens.tolist()) == (other.text, other.tokens.tolist())
    assert len({made.text[-5:] for made in together}) == len(prompts)
    assert lm.generate("a", **options | {"seed": 6}).text != together[0].text


def test_a_stream_adds_up_to_the_text(lm):
    prompts, options = list("abcdefgh"), {"max_tokens": 30, "slide": True, "seed": 1}
    whole = lm.generate(prompts, **options)
    for stop in ("", whole[0].text[9:11]):
        pieces = list(lm.generate(prompts, stream=True, stop=stop, **options))
        assert [piece.index for piece in pieces[:8]] == list(range(8))
        made = {piece.index: piece.result for piece in pieces if piece.result}
        for i, prompt in enumerate(prompts):
            mine = [piece for piece in pieces if piece.index == i]
            assert mine[-1].result is made[i]
            assert "".join(piece.text for piece in mine) == made[i].text
            assert made[i].prompt == prompt
            assert "".join(made[i].pieces).startswith(prompt + made[i].text)
    found = whole[0].text.split(stop)[0]
    assert (made[0].text, made[0].finish) == (found, "stop")


def test_a_view_copies_nothing_and_one_expert_is_a_view(lm):
    med = lm.with_experts(["med"])
    assert med.experts == ("med",)
    alone = med.generate("dose", max_tokens=4, temperature=0.0)
    named = lm.generate("dose", max_tokens=4, temperature=0.0, expert="med")
    assert alone.tokens.tolist() == named.tokens.tolist()
    assert alone.experts == named.experts == ("med",)
    (one,), (other,) = (m._store.weights.load(["med"])[1] for m in (lm, med))
    assert all(one["layers"]["ffn"][k] is other["layers"]["ffn"][k] for k in ("up", "down"))
    whole, part = lm.score(TEXTS), med.score(TEXTS)
    np.testing.assert_array_equal(part.token_logprobs, whole.token_logprobs[1:])


def test_export_hands_out_the_experts(lm, tmp_path):
    (path,) = lm.export("law", tmp_path / "law.safetensors")
    assert path.exists()


def test_an_older_step_is_read_and_not_edited(lm, workdir, tmp_path):
    """Step 2 is from before the experts' branch."""
    older = demix.load(workdir, step=2)
    assert repr(older) == f"LanguageModel({str(workdir)!r}, step 2, experts: dense)"
    assert older.generate("a", max_tokens=2).experts == ("dense",)
    for call in (
        lambda: older.adapt("news", tmp_path / "out"),
        lambda: older.export("dense", tmp_path),
    ):
        with pytest.raises(DemixError, match=r"cannot \w+ step 2 of .*: it takes the newest, 6"):
            call()


BAD = [  # options of `generate`, or of `load` where the prompt is None
    (None, {"experts": ["lew"]}, r"has no expert 'lew'; did you mean 'law'\? \(experts: law, med"),
    (None, {"experts": []}, "name one expert or more of law, med"),
    (None, {"experts": ["law", "law"]}, "expert 'law' is named 2 times"),
    (None, {"step": 5}, "has no step 5"),
    ("a", {"expert": "legal"}, r"has no expert 'legal'.*\(experts: law, med\)"),
    ("a", {"prior": "even"}, "unknown prior 'even'"),
    ("a", {"prior": "cached:lew"}, "no cached prior 'lew'"),
    ("a", {"switch_rate": 1.5}, "switch_rate 1.5"),
    ("a", {"top_k_experts": 3}, "top_k 3 cannot be kept of 2 experts"),
    ("a", {"top_k_experts": -1}, "top_k -1"),
    ("a", {"temperature": -0.1}, "temperature must be 0 or more, and finite, not -0.1"),
    ("a", {"temperature": float("nan")}, "temperature must be"),
    ("a", {"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
    ("a", {"top_k": -1}, "top_k must be 0 or more"),
    ("a", {"seed": -1}, "seed must be 0 to"),
    ("a", {"seed": 2**32}, "seed must be 0 to"),
    ("a", {"drop": 1.0}, r"drop must be in \[0, 1\)"),
    ("a", {"max_tokens": 0}, "max_tokens must be 1 or more"),
    ("a", {"batch_size": 0}, "batch_size must be 1 or more"),
    ("", {}, "prompt 1 is empty"),
    (["a", ""], {}, "prompt 2 is empty"),
    ([], {}, "no prompts"),
    ("\udcff", {}, "prompt 1 has a lone surrogate"),
    ("abcdefgh", {"max_tokens": 1}, "prompt 1 has 9 tokens with its document token, the context 8"),
    ("abc", {"max_tokens": 6}, "the context of 8 has room for max_tokens 5, not 6"),
]  # fmt: skip


def test_bad_input_is_one_line(lm, workdir):
    for prompt, options, message in BAD:
        call = functools.partial(lm.generate, prompt, **{"max_tokens": 2} | options)
        if prompt is None:
            call = functools.partial(demix.load, workdir, **options)
        with pytest.raises(DemixError, match=message) as error:
            call()
        assert "\n" not in str(error.value)
    for texts, message in (([], "no texts"), (["a", "\ud800"], "text 2 has a lone surrogate")):
        with pytest.raises(DemixError, match=message):
            lm.score(texts)


def test_what_fills_the_context_is_taken(lm):
    assert lm.generate("abc", max_tokens=5).generated == 5
    assert lm.generate("abcdefg", max_tokens=1).generated == 1


@pytest.mark.slow
def test_a_run_with_domain_tokens_is_told_the_domain(tmp_path):
    """Its token is read before the text, also behind a slide, and never drawn."""
    tokens = demix.load(make_run(tmp_path / "run", ("dense",), variant="domain_token"))
    made = tokens.generate("ab", expert="dense", max_tokens=30, slide=True, temperature=3.0)
    text, rows = [256, *made.tokens.tolist()], []
    begin = 0
    for end in range(1, len(text)):
        if end - begin > 15:
            begin = end - 7
        rows.append([257, *text[begin : end + 1]])
    padded = np.array([np.pad(row, (0, 17 - len(row))) for row in rows], np.int32)
    shared, (expert,) = tokens._store.weights.load(["dense"])
    model = tokens._run.model
    score = jax.jit(token_logprobs, static_argnums=0)
    scores = score(model, join(shared, expert), padded[:, :-1], padded[:, 1:])
    expected = [scores[i, len(row) - 2] for i, row in enumerate(rows)]
    np.testing.assert_allclose(made.logprobs, expected, atol=1e-4)
    assert max(text) < 257
    for domain, message in (("", "name an expert, one of dense"), ("lew", "no domain token for")):
        with pytest.raises(DemixError, match=message):
            tokens.generate("ab", expert=domain, max_tokens=1)
    with pytest.raises(DemixError, match="needs a domain token for every text"):
        tokens.score("ab")


@pytest.fixture
def command(capsys):
    """`demix generate` in this process: exit status, standard output and error."""
    before = set(flags.FLAGS)

    def run(*arguments: object) -> tuple[int, str, str]:
        for name in set(flags.FLAGS) - before:
            delattr(flags.FLAGS, name)
        with pytest.raises(SystemExit) as ended:
            main(["demix", "generate", *map(str, arguments)])
        return (ended.value.code or 0, *capsys.readouterr())

    yield run
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def test_the_command_writes_what_python_does(command, lm, workdir, tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text('{"text": "ab"}\n{"text": "court"}\n')
    options = {"max_tokens": 3, "seed": 4, "temperature": 0.8, "batch_size": 1}
    given = [f"--workdir={workdir}", *(f"--{name}={value}" for name, value in options.items())]
    expected = lm.generate(["ab", "court"], **options)

    status, out, _ = command(*given, "--prompt=ab")
    assert (status, out) == (0, expected[0].text + "\n")

    status, out, _ = command(*given, f"--input={source}")
    assert [json.loads(line)["text"] for line in out.splitlines()] == [m.text for m in expected]

    command(*given, f"--input={source}", f"--output={tmp_path / 'o.jsonl'}", "--trace")
    for line, made in zip((tmp_path / "o.jsonl").read_text().splitlines(), expected, strict=True):
        values = json.loads(line)
        assert values["experts"] == ["law", "med"]
        assert values["tokens"] == made.tokens.tolist()
        np.testing.assert_allclose(values["posterior"], made.posterior, atol=1e-6)

    status, out, _ = command(*given, f"--input={source}", f"--output={tmp_path / 'o.npz'}")
    found = np.load(tmp_path / "o.npz")
    for i, made in enumerate(expected):
        size = len(made.tokens)
        assert found["mask"][i].sum() == size
        np.testing.assert_array_equal(found["tokens"][i, :size], made.tokens)
        np.testing.assert_array_equal(found["posterior"][i, :size], made.posterior)
        assert found["generated"][i].sum() == 3


def test_bad_flags_are_one_line(command, workdir, tmp_path):
    given = [f"--workdir={workdir}", "--max_tokens=2"]
    for arguments, message in (
        (["--prompt=a", "--input=b"], "give --prompt or --input, one of them"),
        ([], "give --prompt or --input, one of them"),
        ([f"--input={tmp_path / 'none.jsonl'}"], "does not exist"),
        (["--prompt=a", "--output=x.txt"], "x.txt must end in .jsonl or .npz"),
        (["--prompt=a", "--expert=lew"], "has no expert 'lew'; did you mean 'law'"),
        (["--prompt=a", "--temperature=-1"], "temperature must be 0 or more, and finite, not -1.0"),
        (["--prompt="], "--prompt is empty: is a variable not set?"),
    ):
        status, out, err = command(*given, *arguments)
        assert (status, out) == (2, "")
        (line,) = err.splitlines()
        assert line.startswith("demix generate: error: ")
        assert message in line


class Terminal:
    """A stream that says whether it is a terminal."""

    def __init__(self, tty: bool):
        self.isatty = lambda: tty


def test_the_trace_has_colours_only_in_a_terminal(lm, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    made = dataclasses.replace(
        lm.generate("ab", max_tokens=1),
        pieces=("a", "b", "\x1b[2J"),
        posterior=np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]]),
    )
    assert colored(made, Terminal(False)) == "[law: a][med: b][med: \x1b[2J]\nlaw 47%, med 53%"
    shown = colored(made, Terminal(True))
    assert shown.startswith("\x1b[32ma\x1b[0m\x1b[33mb\x1b[0m\x1b[1;33m\ufffd[2J\x1b[0m\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in colored(made, Terminal(True))


def test_text_comes_in_whole_characters_and_stops_before_a_stop_string(lm):
    tokenizer = lm._run.tokenizer
    text = "aé漢😀 b" + "\N{REPLACEMENT CHARACTER}" + "c"
    ids = list(text.encode())
    stream = Detokenizer(tokenizer, ids[:1])
    pieces = [stream.push(i) for i in ids[1:]]
    assert "".join([*pieces, stream.end()]) == text[1:]
    assert pieces[:6] == ["", "é", "", "", "漢", ""]
    broken = [*b"a", 0xE6, 0xBC, *b"b", 0xF0]
    assert "".join(token_pieces(tokenizer, broken)) == bytes(broken).decode(errors="replace")
    for stop, expected in (
        (["END"], "xENy"),
        ("END", "xENy"),
        (["yE", "END"], "xEN"),
        ([], "xENyENDz"),
        ([""], "xENyENDz"),
    ):
        stops, shown = StopStrings(stop), ""
        for letter in "xENyENDz":
            shown += stops.push(letter)
            if stops.found:
                break
        shown += stops.end()
        assert (shown, stops.found) == (expected, len(expected) < 8), stop
