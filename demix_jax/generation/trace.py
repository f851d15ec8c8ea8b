"""The expert behind each token: colours in a terminal, posteriors in files."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from demix_jax.errors import CONTROL, DemixError
from demix_jax.files import open_whole, write_whole
from demix_jax.generation.generate import Generation

ENDINGS = (".jsonl", ".npz")
_COLORS = (32, 33, 35, 36, 34, 31, 92, 93, 95, 96, 94, 91)  # SGR, readable on black and on white


def takes_color(stream: TextIO) -> bool:
    """Returns True for a terminal whose user has not asked for plain text (NO_COLOR)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def printable(text: str, stream: TextIO) -> str:
    """Returns the text without what a terminal would take for commands; files get all of it."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text) if stream.isatty() else text


def colored(generation: Generation, stream: TextIO) -> str:
    """Returns prompt and text with each token in the colour of its most probable expert.

    The generated text is bold, and a legend with the share of tokens follows. Without colour,
    tokens of one expert stand in brackets behind its name.
    """
    color = takes_color(stream)
    parts: list[tuple[tuple[str, bool], str]] = []
    first = len(generation.tokens) - generation.generated
    for i, (piece, expert) in enumerate(zip(generation.pieces, generation.speakers, strict=True)):
        key = expert, i >= first
        if parts and parts[-1][0] == key:
            parts[-1] = key, parts[-1][1] + piece
        else:
            parts.append((key, piece))
    codes = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(generation.experts)}

    def show(text: str, expert: str, bold: bool) -> str:
        text = printable(text, stream)
        if not color:
            return f"[{expert}: {text}]"
        return f"\x1b[{'1;' if bold else ''}{codes[expert]}m{text}\x1b[0m"

    shares = generation.posterior.mean(0)
    legend = [
        f"{show(name, name, False) if color else name} {shares[i]:.0%}"
        for i, name in enumerate(generation.experts)
        if shares[i] >= 0.005
    ]
    body = "".join(show(text, expert, bold) for (expert, bold), text in parts)
    return f"{body}\n{', '.join(legend)}"


def as_json(generation: Generation, *, trace: bool) -> str:
    """Returns one line of JSON; with `trace`, each token's expert weights too."""
    prompt = len(generation.tokens) - generation.generated
    values: dict[str, Any] = {
        "prompt": generation.prompt,
        "text": generation.text,
        "finish": generation.finish,
        "prompt_tokens": prompt,
        "generated_tokens": generation.generated,
        "tokens": generation.tokens.tolist(),
        "logprobs": [round(float(value), 6) for value in generation.logprobs],
    }
    if trace:
        values |= {
            "experts": generation.experts,
            "pieces": generation.pieces,
            "posterior": np.round(generation.posterior.astype(float), 6).tolist(),
        }
    return json.dumps(values, ensure_ascii=False)


def check_output(output: Path) -> None:
    """Raises DemixError unless the ending of a file's name says how to write it."""
    if output.suffix not in ENDINGS:
        raise DemixError(f"output {output} must end in {' or '.join(ENDINGS)}")


def write_generations(output: Path, generations: Sequence[Generation], *, trace: bool) -> None:
    """Writes texts: lines of JSON, or arrays as `demix score` does, [N, P] and [N, P, D].

    Arrays are `tokens`, `mask` (False behind a text's end), `generated` (True for generated
    tokens), `mixture_logprobs`, `posterior` and `experts`.
    """
    check_output(output)
    if output.suffix == ".jsonl":
        write_whole(output, "".join(as_json(g, trace=trace) + "\n" for g in generations))
        return
    longest = max(len(g.tokens) for g in generations)
    experts = generations[0].experts
    shape = len(generations), longest
    mask, generated = np.zeros(shape, bool), np.zeros(shape, bool)
    tokens, logprobs = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    posterior = np.zeros((*shape, len(experts)), np.float32)
    for i, text in enumerate(generations):
        size = len(text.tokens)
        mask[i, :size] = True
        generated[i, size - text.generated : size] = True
        tokens[i, :size], logprobs[i, :size] = text.tokens, text.logprobs
        posterior[i, :size] = text.posterior
    with open_whole(output) as file:
        np.savez(
            file,
            tokens=tokens,
            mask=mask,
            generated=generated,
            mixture_logprobs=logprobs,
            posterior=posterior,
            experts=np.array(experts),
        )
