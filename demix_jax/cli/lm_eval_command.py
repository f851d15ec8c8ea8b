"""The verb that evaluates a run under lm-evaluation-harness: its flags and one call."""

from pathlib import Path

from absl import flags

from demix_jax.cli.commands import Verb
from demix_jax.cli.settings_flags import (
    define_path,
    define_settings,
    field_help,
    given_path,
    read_settings,
)
from demix_jax.harness.settings import Settings

_OPTIONAL = ("switch_rate", "limit", "num_fewshot")


def _define_lm_eval() -> None:
    define_path("workdir", "Run whose newest checkpoint is evaluated.")
    define_path("output", "File of the results, .json; the tables are printed.", written="file")
    define_path("include_path", field_help(Settings, "include_path"))
    flags.DEFINE_list("tasks", None, field_help(Settings, "tasks"))
    flags.DEFINE_float("switch_rate", None, field_help(Settings, "switch_rate"))
    flags.DEFINE_float("limit", None, field_help(Settings, "limit"))
    flags.DEFINE_integer("num_fewshot", None, field_help(Settings, "num_fewshot"))
    define_settings(Settings, without=("tasks", "include_path", *_OPTIONAL))


def _run_lm_eval() -> None:
    given = flags.FLAGS
    settings = read_settings(
        Settings,
        tasks=tuple(given.tasks),
        include_path=given.include_path or "",
        **{name: given[name].value for name in _OPTIONAL},
    )
    from demix_jax.harness.tasks import evaluate_tasks

    evaluate_tasks(Path(given.workdir), settings, given_path("output"))


VERBS = {
    "lm-eval": Verb(
        _define_lm_eval, _run_lm_eval, "evaluate on lm-eval's tasks", ("workdir", "tasks")
    )
}
