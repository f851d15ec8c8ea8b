"""The verb that lets a run write: its flags and one call."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from demix_jax.cli.commands import Verb, define_fallback
from demix_jax.cli.settings_flags import define_path, define_settings, field_help, read_settings
from demix_jax.errors import DemixError
from demix_jax.generation.settings import Settings

if TYPE_CHECKING:
    from demix_jax.generation.generate import Piece


def _define_generate() -> None:
    define_path("workdir", "Run whose newest checkpoint writes.")
    flags.DEFINE_string("prompt", None, "Text to go on with; or give --input.")
    define_path("input", "JSON lines with a field `text`; .gz and .zst too.")
    define_path("output", "File of the texts, .jsonl or .npz; default: printed.", written="file")
    flags.DEFINE_bool("trace", False, "Colour each token by its expert; write the posterior too.")
    flags.DEFINE_multi_string("stop", [], field_help(Settings, "stop").rstrip("."))
    flags.DEFINE_float("switch_rate", None, field_help(Settings, "switch_rate"))
    define_settings(Settings, without=("stop", "switch_rate"))
    define_fallback()


def _run_generate() -> None:
    given = flags.FLAGS
    if (given.prompt is None) == (given.input is None):
        raise DemixError("give --prompt or --input, one of them")
    settings = read_settings(Settings, stop=tuple(given.stop), switch_rate=given.switch_rate)
    settings.validate()
    from demix_jax.api import load
    from demix_jax.evaluation.score_texts import read_texts
    from demix_jax.generation.trace import (
        as_json,
        check_output,
        colored,
        printable,
        write_generations,
    )

    output = Path(given.output) if given.output else None
    if output:
        check_output(output)
    prompts = [given.prompt] if given.input is None else read_texts(Path(given.input))
    model = load(given.workdir, fallback=given.fallback)
    pieces = model.generate(prompts, stream=True, **vars(settings))
    live = given.input is None and not given.trace and not output
    found = {}
    for piece in pieces:
        if live:
            _show(piece)
        if piece.result:
            found[piece.index] = piece.result
    generations = [found[i] for i in range(len(prompts))]
    if output:
        write_generations(output, generations, trace=given.trace)
        print(f"{len(generations)} texts: {output}")
    if given.trace:
        print("\n\n".join(colored(generation, sys.stdout) for generation in generations))
    elif not live and not output:
        lines = "\n".join(as_json(generation, trace=False) for generation in generations)
        print(printable(lines, sys.stdout))


def _show(piece: "Piece") -> None:
    """Prints the text of one prompt as it comes."""
    from demix_jax.generation.trace import printable

    print(printable(piece.text, sys.stdout), end="\n" if piece.result else "", flush=True)


VERBS = {"generate": Verb(_define_generate, _run_generate, "write text", ("workdir",))}
