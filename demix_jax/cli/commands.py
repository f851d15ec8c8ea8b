"""The verbs that prepare text, train runs and read text with them: their flags and one call each.

Heavy modules are imported by the calls, so that `--help` answers at once.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from absl import flags

from demix_jax.cli.settings_flags import (
    define_data_dir,
    define_path,
    define_paths,
    define_settings,
    field_help,
    given_path,
    parse_integers,
    read_settings,
)
from demix_jax.config.schema import Config, DataConfig
from demix_jax.errors import DemixError
from demix_jax.evaluation.settings import Settings as EvalSettings
from demix_jax.experts.settings import Settings as AdaptSettings
from demix_jax.mixing.modes import MODES

if TYPE_CHECKING:
    from demix_jax.parallel.distributed import Job


class Verb(NamedTuple):
    """A verb of the command line.

    Attributes:
      define: function that defines its flags.
      run: function that reads its flags and does the work; raises DemixError for a user's mistake.
      about: summary in a few words.
      required: flags that must be given.
      configured: True if it takes --config and --data_dir; `run` is then given the Config.
    """

    define: Callable[[], None]
    run: Callable[..., object]
    about: str
    required: tuple[str, ...] = ()
    configured: bool = False


def define_fallback() -> None:
    """Defines the flag of verbs that read a checkpoint and change no expert in it."""
    about = "If the newest step is damaged, take the newest that is whole; all of it is read."
    flags.DEFINE_bool("fallback", False, about)


def define_job() -> None:
    """Defines the flags of verbs that several processes can run together."""
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0; default: detected.")
    flags.DEFINE_integer("num_processes", 0, "Processes; 0: detected.", lower_bound=0)
    flags.DEFINE_integer("process_id", -1, "Number of this process, from 0; -1: detected.")
    flags.DEFINE_bool("distributed", True, "Detect Slurm, Open MPI and TPU pods.")
    flags.DEFINE_integer("connect_timeout", 300, "Seconds to wait for the others.", lower_bound=1)
    flags.DEFINE_integer(
        "heartbeat_timeout",
        60,
        "Seconds without a heartbeat after which a process is declared dead.",
        lower_bound=5,
    )


def _job() -> "Job":
    from demix_jax.parallel.distributed import Job

    given = flags.FLAGS
    return Job(
        given.coordinator,
        given.num_processes,
        given.process_id,
        given.distributed,
        given.connect_timeout,
        given.heartbeat_timeout,
    )


def _define_prepare() -> None:
    skipped = f"{field_help(DataConfig, 'skip_bad_lines')} Default: the config's."
    flags.DEFINE_integer("skip_bad_lines", None, skipped)
    flags.DEFINE_string(
        "runner",
        "local",
        "local, or an Apache Beam runner: DirectRunner, DataflowRunner, FlinkRunner, SparkRunner.",
    )
    flags.DEFINE_integer(
        "workers", 0, "Processes of the local runner; 0: one for each core.", lower_bound=0
    )
    flags.DEFINE_list("beam_options", [], "Options of the Beam pipeline, such as --project=P.")


def _run_prepare(config: Config) -> None:
    from demix_jax.data.prepare.prepare import prepare

    given = flags.FLAGS
    if given.skip_bad_lines is not None:
        config.data.skip_bad_lines = given.skip_bad_lines
    prepare(
        config.validate(),
        runner=given.runner,
        workers=given.workers,
        beam_options=given.beam_options,
    )


def _define_train() -> None:
    about = "Folder of the run; the same command again resumes it."
    define_path("workdir", about, written="folder")
    define_fallback()
    define_job()


def _run_train(config: Config) -> None:
    from demix_jax.parallel.distributed import distributed_session
    from demix_jax.training.train import train

    with distributed_session(_job()):
        train(config, Path(flags.FLAGS.workdir), fallback=flags.FLAGS.fallback)


def _define_evaluate() -> None:
    define_paths("workdir", "Runs to evaluate, comma-separated.")
    about = "Folder for results.json; may be shared by processes."
    define_path("out", about, written="folder")
    define_path("before", "Folder of earlier results, to print what has changed since.")
    define_data_dir("prepared data; default: that of each run")
    define_settings(
        EvalSettings,
        at_least={"tokens": 0, "batch_size": 1, "prior_sequences": 1},
        choices={"split": ("train", "valid", "test")},
        without=("shard", "modes"),
    )
    about = field_help(EvalSettings, "modes")
    flags.DEFINE_list("modes", ["known"], f"{about} Mixing modes: {', '.join(MODES)}.")
    flags.DEFINE_string("shard", "0/1", field_help(EvalSettings, "shard"))
    define_fallback()
    define_job()


def _run_evaluate() -> None:
    given = flags.FLAGS
    shard = parse_integers("shard", given.shard.split("/"))
    if len(shard) != 2:
        raise DemixError(f"--shard takes i/n, not {given.shard!r}")
    settings = read_settings(EvalSettings, shard=shard, modes=tuple(given.modes))
    from demix_jax.evaluation.evaluate import evaluate
    from demix_jax.parallel.distributed import distributed_session

    workdirs = [Path(workdir) for workdir in dict.fromkeys(given.workdir)]
    before, data_dir = given_path("before"), given.data_dir or ""
    with distributed_session(_job(), saves=False):
        evaluate(
            workdirs,
            Path(given.out),
            settings,
            data_dir=data_dir,
            before=before,
            fallback=given.fallback,
        )


def _define_score() -> None:
    define_path("workdir", "Run whose newest checkpoint scores.")
    about = "JSON lines with a field `text`, .gz and .zst too, a pipe, or a place of data.sources."
    flags.DEFINE_string("input", None, about)
    define_path("output", "File of the scores, .npz.", written="file")
    flags.DEFINE_string("prior", "uniform", "uniform, updating or cached:NAME.")
    flags.DEFINE_float("switch_rate", None, "In [0, 1]; default: the cached prior's, else 0.")
    flags.DEFINE_integer("top_k", 0, "Experts kept; 0: all.")
    flags.DEFINE_integer("batch_size", 16, "Sequences scored at once.", lower_bound=1)
    define_fallback()


def _run_score() -> None:
    from demix_jax.evaluation.score_texts import score_file

    given = flags.FLAGS
    score_file(
        Path(given.workdir),
        given.input,
        Path(given.output),
        prior=given.prior,
        switch_rate=given.switch_rate,
        top_k=given.top_k,
        batch_size=given.batch_size,
        fallback=given.fallback,
    )


def _define_report() -> None:
    define_paths("results", "Folders that `demix evaluate` wrote, comma-separated.")
    define_path("out", "Folder for report.html, report.md and plots/.", written="folder")


def _run_report() -> None:
    from demix_jax.report.page import report

    folders = [Path(folder) for folder in dict.fromkeys(flags.FLAGS.results)]
    report(folders, Path(flags.FLAGS.out))


def _define_adapt() -> None:
    define_path("workdir", "Run to adapt; a demix run gets the new experts.")
    about = "Prepared domains, or NAME=PLACE with their text; several train side by side."
    flags.DEFINE_list("domain", None, about)
    about = "Folder of the adaptation; the same command again resumes it."
    define_path("out", about, written="folder")
    flags.DEFINE_string("parent", "", "Expert to copy; default: the largest posterior.")
    flags.DEFINE_bool("add", True, "Add the experts to the run when they are done.")
    flags.DEFINE_string("owns", "", "First widen the run's experts to this model.expert_owns.")
    define_data_dir("prepared data; default: that of the run")
    define_settings(
        AdaptSettings, at_least={"steps": 1, "validate_every": 0, "checkpoint_every": 0, "seed": 0}
    )
    define_job()


def _run_adapt() -> None:
    from demix_jax.experts.adapt import adapt
    from demix_jax.parallel.distributed import distributed_session

    given = flags.FLAGS
    with distributed_session(_job()):
        adapt(
            Path(given.workdir),
            tuple(given.domain),
            Path(given.out),
            read_settings(AdaptSettings),
            parent=given.parent,
            add=given.add,
            data_dir=given.data_dir or "",
            owns=given.owns,
        )


VERBS = {
    "prepare": Verb(
        _define_prepare, _run_prepare, "tokenize domains into token files", ("config",), True
    ),
    "train": Verb(_define_train, _run_train, "train or resume a run", ("config", "workdir"), True),
    "evaluate": Verb(
        _define_evaluate, _run_evaluate, "score experts on held-out text", ("workdir", "out")
    ),
    "score": Verb(
        _define_score, _run_score, "score texts of unknown domain", ("workdir", "input", "output")
    ),
    "adapt": Verb(
        _define_adapt, _run_adapt, "train experts for new domains", ("workdir", "domain", "out")
    ),
    "report": Verb(_define_report, _run_report, "draw results as a page", ("results", "out")),
}
