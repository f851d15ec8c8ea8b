"""The verbs that prepare text, train runs and read text with them: their flags and one call each.

Heavy modules are imported by the call itself, so that `demix --help` answers at once.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from absl import flags

from demix_jax.config.schema import Config
from demix_jax.errors import DemixError
from demix_jax.mixing.modes import MODES

if TYPE_CHECKING:
    from demix_jax.parallel.distributed import Job


class Verb(NamedTuple):
    """A verb of the command line.

    Attributes:
        define: Defines its flags.
        run: Reads its flags and does the work; raises DemixError for a user's mistake.
        about: What it does, in a few words.
        configured: Whether it takes --config and --data_dir; `run` is then given the Config.
    """

    define: Callable[[], None]
    run: Callable[..., object]
    about: str
    configured: bool = False


def define_data_dir(about: str) -> None:
    """Defines --data_dir, a folder of what `about` says."""
    flags.DEFINE_string("data_dir", "", f"Folder of {about}.")


def define_job() -> None:
    """Defines the flags of verbs that several processes can run together."""
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0; default: what is detected.")
    flags.DEFINE_integer("num_processes", 0, "Of the job; default: detected.", lower_bound=0)
    flags.DEFINE_integer("process_id", -1, "Of this process, from 0; default: detected.")
    flags.DEFINE_bool("distributed", True, "Detect Slurm, Open MPI and TPU pods.")
    flags.DEFINE_integer("connect_timeout", 300, "Seconds to wait for the others.", lower_bound=1)
    flags.DEFINE_integer("silence", 60, "Seconds until a silent process is dead.", lower_bound=5)


def _job() -> "Job":
    from demix_jax.parallel.distributed import Job

    given = flags.FLAGS
    return Job(
        given.coordinator,
        given.num_processes,
        given.process_id,
        given.distributed,
        given.connect_timeout,
        given.silence,
    )


def _define_prepare() -> None:
    flags.DEFINE_integer("skip_bad_lines", None, "Broken JSON lines tolerated in each domain.")
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
    flags.DEFINE_string("workdir", None, "Folder of the run; the same command again resumes it.")
    define_job()
    flags.mark_flag_as_required("workdir")


def _run_train(config: Config) -> None:
    from demix_jax.parallel.distributed import distributed_session
    from demix_jax.training.train import train

    with distributed_session(_job()):
        train(config, Path(flags.FLAGS.workdir))


def _define_evaluate() -> None:
    flags.DEFINE_list("workdir", None, "Runs to evaluate, comma-separated.")
    flags.DEFINE_string("out", None, "Folder for results.json; may be shared by processes.")
    flags.DEFINE_list("domains", [], "Domains; default: those each run was trained on.")
    flags.DEFINE_enum("split", "test", ["train", "valid", "test"], "Held-out text to read.")
    flags.DEFINE_integer("tokens", 0, "Per domain, in whole documents; 0: all.", lower_bound=0)
    flags.DEFINE_list("modes", ["known"], f"known, {', '.join(MODES)}.")
    flags.DEFINE_list(
        "switch_rates", ["0", "dev"], "Numbers in [0, 1]; dev: best on 100 sequences."
    )
    flags.DEFINE_list("top_k", ["0"], "Numbers of experts kept; 0: all.")
    flags.DEFINE_bool("refresh_priors", False, "Estimate cached priors anew.")
    flags.DEFINE_string("shard", "0/1", "i/n: every n-th (run, domain) pair from the i-th on.")
    flags.DEFINE_integer("batch_size", 16, "Sequences scored at once.", lower_bound=1)
    flags.DEFINE_string("before", "", "Folder of earlier results, to print what has changed since.")
    define_data_dir("prepared data; default: what each run was trained on")
    define_job()
    flags.mark_flags_as_required(["workdir", "out"])


def _integers(name: str, values: Sequence[str]) -> tuple[int, ...]:
    try:
        return tuple(int(value) for value in values)
    except ValueError:
        raise DemixError(f"--{name} takes whole numbers, not {','.join(values)!r}") from None


def _run_evaluate() -> None:
    from demix_jax.evaluation.evaluate import Settings, evaluate
    from demix_jax.parallel.distributed import distributed_session

    given = flags.FLAGS
    shard = _integers("shard", given.shard.split("/"))
    if len(shard) != 2:
        raise DemixError(f"--shard takes i/n, not {given.shard!r}")
    settings = Settings(
        domains=tuple(given.domains),
        split=given.split,
        tokens=given.tokens,
        batch_size=given.batch_size,
        modes=tuple(given.modes),
        switch_rates=tuple(given.switch_rates),
        top_k=_integers("top_k", given.top_k),
        refresh_priors=given.refresh_priors,
        shard=(shard[0], shard[1]),
    )
    workdirs = [Path(workdir) for workdir in given.workdir]
    before = Path(given.before) if given.before else None
    with distributed_session(_job(), saves=False):
        evaluate(workdirs, Path(given.out), settings, data_dir=given.data_dir, before=before)


def _define_score() -> None:
    flags.DEFINE_string("workdir", None, "Run whose newest checkpoint scores.")
    flags.DEFINE_string("input", None, "JSON lines with a field `text`; .gz and .zst too.")
    flags.DEFINE_string("output", None, "File of the scores, .npz.")
    flags.DEFINE_string("prior", "uniform", "uniform, updating or cached:NAME.")
    flags.DEFINE_float("switch_rate", None, "In [0, 1]; default: the cached prior's, else 0.")
    flags.DEFINE_integer("top_k", 0, "Experts kept; 0: all.")
    flags.DEFINE_integer("batch_size", 16, "Sequences scored at once.", lower_bound=1)
    flags.mark_flags_as_required(["workdir", "input", "output"])


def _run_score() -> None:
    from demix_jax.evaluation.score_texts import score_file

    given = flags.FLAGS
    score_file(
        Path(given.workdir),
        Path(given.input),
        Path(given.output),
        prior=given.prior,
        switch_rate=given.switch_rate,
        top_k=given.top_k,
        batch_size=given.batch_size,
    )


def _define_report() -> None:
    flags.DEFINE_list("results", None, "Folders that `demix evaluate` wrote, comma-separated.")
    flags.DEFINE_string("out", None, "Folder for report.html, report.md and plots/.")
    flags.mark_flags_as_required(["results", "out"])


def _run_report() -> None:
    from demix_jax.report.page import report

    report([Path(folder) for folder in flags.FLAGS.results], Path(flags.FLAGS.out))


def _define_adapt() -> None:
    flags.DEFINE_string("workdir", None, "Run to adapt; a demix run gets the new experts.")
    flags.DEFINE_list("domain", None, "Prepared domains; several experts train side by side.")
    flags.DEFINE_string("out", None, "Folder of the adaptation; the same command again resumes it.")
    flags.DEFINE_string("parent", "", "Expert to copy; default: the largest posterior.")
    flags.DEFINE_bool("add", True, "Add the experts to the run when they are done.")
    flags.DEFINE_integer("steps", 1000, "Updates at most.", lower_bound=1)
    flags.DEFINE_float("learning_rate", 0.0, "Its peak; 0: a tenth of the run's.")
    flags.DEFINE_float("warmup", 0.08, "Share of all steps.")
    flags.DEFINE_integer("batch_size", 0, "Sequences per domain and update; 0: the run's.")
    flags.DEFINE_integer("validate_every", 0, "Steps; 0: a twentieth of all.", lower_bound=0)
    flags.DEFINE_integer("patience", 3, "Validations without improvement; 0: never stop early.")
    flags.DEFINE_integer("checkpoint_every", 0, "Steps; 0: with each validation.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of the order of text.", lower_bound=0)
    define_data_dir("prepared data; default: what the run was trained on")
    define_job()
    flags.mark_flags_as_required(["workdir", "domain", "out"])


def _run_adapt() -> None:
    from demix_jax.experts.adapt import Settings, adapt
    from demix_jax.parallel.distributed import distributed_session

    given = flags.FLAGS
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: given[name].value for name in names})
    with distributed_session(_job()):
        adapt(
            Path(given.workdir),
            tuple(given.domain),
            Path(given.out),
            settings,
            parent=given.parent,
            add=given.add,
            data_dir=given.data_dir,
        )


PREPARE = Verb(
    _define_prepare, _run_prepare, "tokenize domains into flat token files", configured=True
)
TRAIN = Verb(_define_train, _run_train, "train or resume a run", configured=True)
EVALUATE = Verb(_define_evaluate, _run_evaluate, "score experts and mixtures on held-out text")
SCORE = Verb(_define_score, _run_score, "score texts of unknown domain")
ADAPT = Verb(_define_adapt, _run_adapt, "train experts for new domains and add them")
REPORT = Verb(_define_report, _run_report, "results as a page with plots")
