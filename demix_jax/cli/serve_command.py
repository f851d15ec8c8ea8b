"""The verb that serves a run: its flags and one call."""

from pathlib import Path

from absl import flags

from demix_jax.cli.commands import Verb
from demix_jax.cli.settings_flags import define_path, define_settings, given_path, read_settings
from demix_jax.serving.settings import Settings


def _define_serve() -> None:
    define_path("workdir", "Run whose newest checkpoint is served.")
    define_path("api_key_file", "File of one line, the key that requests must bring.")
    define_settings(Settings)


def _run_serve() -> None:
    settings = read_settings(Settings)
    settings.validate()
    from demix_jax.serving.server import serve

    serve(Path(flags.FLAGS.workdir), settings, given_path("api_key_file"))


VERBS = {"serve": Verb(_define_serve, _run_serve, "serve completions and a page", ("workdir",))}
