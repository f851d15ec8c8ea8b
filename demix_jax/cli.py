"""`demix <verb>`: flags to configuration to one call."""

import dataclasses
import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from demix_jax.config import Config, field_type
from demix_jax.errors import DemixError, suggest


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one verb; a DemixError becomes one line on stderr and exit status 2."""
    arguments = list(sys.argv if argv is None else argv)
    verb = arguments[1] if len(arguments) > 1 else ""
    if verb == "experts" and len(arguments) > 2 and not arguments[2].startswith("-"):
        verb = f"experts {arguments.pop(2)}"
    if verb in ("", "-h", "--help", "help"):
        print(_usage())
        sys.exit(0 if verb else 2)
    try:
        if actions := [name for name in _VERBS if name.startswith(f"{verb} ")]:
            raise DemixError(f"do what? `demix {'`, `demix '.join(actions)}`")
        if verb not in _VERBS:
            raise DemixError(f"unknown verb {verb!r}{suggest(verb, _VERBS)}\n{_usage()}")
        define, run, _ = _VERBS[verb]
        arguments = _overrides(arguments)
        define()
        if {"-h", "--help"} & set(arguments[2:]):
            print(_help(verb))
            sys.exit(0)
        quiet = [f"demix {verb}", "--verbosity=-1"]  # at INFO, Orbax narrates every file
        app.run(
            lambda rest: _call(verb, run, rest),
            argv=[*quiet, *arguments[2:]],
            flags_parser=lambda given: _parse(verb, given),
        )
    except DemixError as error:
        _fail(verb, error)
    sys.exit(0)


def _parse(verb: str, arguments: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        missing = re.match(r"flag --(\w+)=None: ", str(error))
        text = f"--{missing[1]} is required" if missing else str(error).splitlines()[0]
        _fail(verb, DemixError(f"{text}; `demix {verb} --help` lists all flags"))


def _help(verb: str) -> str:
    """The flags of a verb: those that this module defines."""
    mine = flags.FLAGS.flags_by_module_dict()[__name__]
    lines = [f"usage: demix {verb} [--flags]: {_VERBS[verb][2]}", ""]
    for flag in sorted(mine, key=lambda flag: flag.name):
        if not flag.name.startswith("config."):
            shown = (flag.default_as_str or "").strip("'")
            default = f" (default: {shown})" if shown else ""
            lines.append(f"  --{flag.name:17} {flag.help}{default}")
    return "\n".join(lines)


def _call(verb: str, run: Callable[[], object], rest: Sequence[str]) -> None:
    if len(rest) > 1:
        _fail(verb, DemixError(f"unexpected argument {rest[1]!r}; flags start with --"))
    try:
        run()
    except DemixError as error:
        _fail(verb, error)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _fail(verb, DemixError(f"{error.strerror}: {error.filename or 'while writing'}"))


def _fail(verb: str, error: Exception) -> NoReturn:
    sys.stdout.flush()
    print(f"demix {verb}: error: {error}", file=sys.stderr)
    sys.exit(2)


def _usage() -> str:
    verbs = "\n".join(f"  {name:15} {about}" for name, (_, _, about) in _VERBS.items())
    return f"usage: demix <verb> [--flags]\n\n{verbs}\n\n`demix <verb> --help` lists its flags."


def _overrides(arguments: Sequence[str]) -> list[str]:
    """Checks --config.some.key flags, naming the nearest key for an unknown one.

    Lists may be given as "a,b": they become the tuple literals that config_flags reads.
    """
    checked = []
    for argument in arguments:
        name, equals, value = argument.lstrip("-").partition("=")
        prefix, dot, key = name.removeprefix("no").partition(".")
        if argument.startswith("-") and prefix + dot == "config.":
            kind = field_type(key)
            if kind == tuple[str, ...] and equals and not value.startswith("("):
                argument = f"--{name}={tuple(value.split(','))!r}"
        checked.append(argument)
    return checked


def _define_config() -> None:
    config_flags.DEFINE_config_file(
        "config", None, "Experiment, such as configs/quick.py; --config.train.steps=20 overrides."
    )
    flags.mark_flag_as_required("config")
    _define_data_dir("prepared data; default: data.dir of the config")


def _define_data_dir(about: str) -> None:
    flags.DEFINE_string("data_dir", "", f"Folder of {about}.")


def _config() -> Config:
    path = flags.FLAGS["config"].config_filename
    if not Path(path).is_file():
        choices = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
        raise DemixError(f"config file {path!r} does not exist (configs: {choices or 'none here'})")
    config = flags.FLAGS.config
    if not isinstance(config, Config):
        raise DemixError(f"{path}: get_config() must return a demix_jax Config, not {config!r}")
    if flags.FLAGS.data_dir:
        config.data.dir = flags.FLAGS.data_dir
    return config.validate()


def _define_prepare() -> None:
    _define_config()
    flags.DEFINE_integer("skip_bad_lines", None, "Broken JSON lines tolerated in each domain.")


def _run_prepare() -> None:
    from demix_jax.prepare import prepare

    config = _config()
    if flags.FLAGS.skip_bad_lines is not None:
        config.data.skip_bad_lines = flags.FLAGS.skip_bad_lines
    prepare(config.validate())


def _define_train() -> None:
    _define_config()
    flags.DEFINE_string("workdir", None, "Folder of the run; the same command again resumes it.")
    flags.mark_flag_as_required("workdir")


def _run_train() -> None:
    from demix_jax.train import train

    train(_config(), Path(flags.FLAGS.workdir))


def _define_evaluate() -> None:
    flags.DEFINE_list("workdir", None, "Runs to evaluate, comma-separated.")
    flags.DEFINE_string("out", None, "Folder for results.json; may be shared by processes.")
    flags.DEFINE_list("domains", [], "Domains; default: those each run was trained on.")
    flags.DEFINE_enum("split", "test", ["train", "valid", "test"], "Held-out text to read.")
    flags.DEFINE_integer("tokens", 0, "Per domain, in whole documents; 0: all.", lower_bound=0)
    flags.DEFINE_list("modes", ["known"], "known, average, uniform, updating, cached, released_*.")
    flags.DEFINE_list(
        "switch_rates", ["0", "dev"], "Numbers in [0, 1]; dev: best on 100 sequences."
    )
    flags.DEFINE_list("top_k", ["0"], "Numbers of experts kept; 0: all.")
    flags.DEFINE_string("prior_method", "average", "Of cached priors: average or em.")
    flags.DEFINE_bool("refresh_priors", False, "Estimate cached priors anew.")
    flags.DEFINE_string("shard", "0/1", "i/n: every n-th (run, domain) pair from the i-th on.")
    flags.DEFINE_integer("batch_size", 16, "Sequences scored at once.", lower_bound=1)
    flags.DEFINE_string("before", "", "Folder of earlier results, to print what has changed since.")
    _define_data_dir("prepared data; default: what each run was trained on")
    flags.mark_flags_as_required(["workdir", "out"])


def _integers(name: str, values: Sequence[str]) -> tuple[int, ...]:
    try:
        return tuple(int(value) for value in values)
    except ValueError:
        raise DemixError(f"--{name} takes whole numbers, not {','.join(values)!r}") from None


def _run_evaluate() -> None:
    from demix_jax.evaluate import Settings, evaluate

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
        prior_method=given.prior_method,
        refresh_priors=given.refresh_priors,
        shard=(shard[0], shard[1]),
    )
    workdirs = [Path(workdir) for workdir in given.workdir]
    before = Path(given.before) if given.before else None
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
    from demix_jax.score_texts import score_file

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
    from demix_jax.report import report

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
    _define_data_dir("prepared data; default: what the run was trained on")
    flags.mark_flags_as_required(["workdir", "domain", "out"])


def _run_adapt() -> None:
    from demix_jax.adapt import Settings, adapt

    given = flags.FLAGS
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: given[name].value for name in names})
    adapt(
        Path(given.workdir),
        tuple(given.domain),
        Path(given.out),
        settings,
        parent=given.parent,
        add=given.add,
        data_dir=given.data_dir,
    )


def _define_workdir(*more: str) -> None:
    flags.DEFINE_string("workdir", None, "The run.")
    flags.mark_flags_as_required(["workdir", *more])


def _define_experts_list() -> None:
    _define_workdir()


def _run_experts_list() -> None:
    from demix_jax.experts import list_experts

    print(list_experts(Path(flags.FLAGS.workdir)))


def _define_experts_add() -> None:
    flags.DEFINE_list("name", None, "Names of the new experts.")
    flags.DEFINE_list(
        "from",
        None,
        "For each, an expert, a run (FOLDER or FOLDER:EXPERT) or a .safetensors file; "
        "or, for one, an average of experts: a=0.7,b=0.3.",
    )
    _define_workdir("name", "from")


def _run_experts_add() -> None:
    from demix_jax.experts import add_experts, merge_experts

    workdir, names = Path(flags.FLAGS.workdir), flags.FLAGS.name
    sources = flags.FLAGS["from"].value
    if len(names) == 1 and all("=" in source for source in sources):
        merge_experts(workdir, names[0], partial(_weights, sources))
    else:
        add_experts(workdir, names, sources)


def _weights(given: Sequence[str]) -> dict[str, float]:
    pairs = [text.partition("=") for text in given]
    try:
        weights = {name: float(value) for name, _, value in pairs}
    except ValueError:
        raise DemixError(f"weights are a=0.7,b=0.3, not {','.join(given)!r}") from None
    if len(weights) < len(pairs):
        raise DemixError(f"weights {','.join(given)!r} name an expert twice")
    return weights


def _define_experts_merge() -> None:
    flags.DEFINE_list("weights", None, "posterior, uniform, or numbers: a=0.7,b=0.3.")
    flags.DEFINE_string("to", None, "Name of the merged expert.")
    flags.DEFINE_string("domain", "", "With posterior: the domain whose cached prior is taken.")
    _define_data_dir("prepared data; default: what the run was trained on")
    _define_workdir("weights", "to")


def _run_experts_merge() -> None:
    from demix_jax.experts import merge_experts, posterior_weights, uniform_weights

    given = flags.FLAGS
    workdir = Path(given.workdir)
    if given.weights == ["posterior"]:
        if not given.domain:
            raise DemixError("--weights posterior needs --domain, whose posterior is meant")
        weights = partial(posterior_weights, workdir, given.domain, given.data_dir)
    elif given.weights == ["uniform"]:
        weights = partial(uniform_weights, workdir)
    else:
        weights = partial(_weights, given.weights)
    merge_experts(workdir, given.to, weights)


def _define_experts_remove() -> None:
    flags.DEFINE_list("name", None, "Experts to remove.")
    flags.DEFINE_bool("purge_history", False, "Delete older steps that have them.")
    flags.DEFINE_bool("scan", True, "Look for their tensors in every remaining file.")
    _define_workdir("name")


def _run_experts_remove() -> None:
    from demix_jax.experts import remove_experts

    given = flags.FLAGS
    remove_experts(
        Path(given.workdir), given.name, purge_history=given.purge_history, scan=given.scan
    )


def _define_experts_rename() -> None:
    flags.DEFINE_list("name", None, "Experts to rename.")
    flags.DEFINE_list("to", None, "Their new names, in the same order.")
    _define_workdir("name", "to")


def _run_experts_rename() -> None:
    from demix_jax.experts import rename_experts

    old, new = flags.FLAGS.name, flags.FLAGS.to
    if len(old) != len(new):
        raise DemixError(f"{len(old)} names and {len(new)} new names; give one for each")
    if len(set(old)) < len(old):
        raise DemixError(f"--name {','.join(old)} names an expert twice")
    rename_experts(Path(flags.FLAGS.workdir), dict(zip(old, new, strict=True)))


def _define_experts_export() -> None:
    flags.DEFINE_list("name", None, "Experts to export.")
    flags.DEFINE_string("output", None, "A .safetensors file, or the folder of one for each.")
    flags.DEFINE_bool("optimizer", True, "With the optimizer state, where there is one.")
    flags.DEFINE_bool("overwrite", False, "Replace files that exist.")
    _define_workdir("name", "output")


def _run_experts_export() -> None:
    from demix_jax.experts import export_experts

    given = flags.FLAGS
    export_experts(
        Path(given.workdir),
        given.name,
        Path(given.output),
        optimizer=given.optimizer,
        overwrite=given.overwrite,
    )


def _define_experts_import() -> None:
    flags.DEFINE_list("input", None, "Exported .safetensors files.")
    flags.DEFINE_list("name", [], "Names in this run; default: their own.")
    _define_workdir("input")


def _run_experts_import() -> None:
    from demix_jax.experts import import_experts

    given = flags.FLAGS
    import_experts(Path(given.workdir), [Path(file) for file in given.input], given.name)


def _define_experts_verify() -> None:
    _define_workdir()


def _run_experts_verify() -> None:
    from demix_jax.verify import verify

    verify(Path(flags.FLAGS.workdir))


def _define_materialize() -> None:
    flags.DEFINE_list("expert", [], "Experts to keep; one for a dense run; default: all.")
    flags.DEFINE_string("out", None, "Folder of the new run.")
    flags.DEFINE_enum("variant", "dense", ["dense", "demix"], "What the new run is.")
    _define_workdir("out")


def _run_materialize() -> None:
    from demix_jax.materialize import materialize

    given = flags.FLAGS
    materialize(Path(given.workdir), given.expert, Path(given.out), variant=given.variant)


_VERBS: dict[str, tuple[Callable[[], None], Callable[[], None], str]] = {
    "prepare": (_define_prepare, _run_prepare, "tokenize domains into flat token files"),
    "train": (_define_train, _run_train, "train or resume a run"),
    "evaluate": (_define_evaluate, _run_evaluate, "score experts and mixtures on held-out text"),
    "score": (_define_score, _run_score, "score texts of unknown domain"),
    "adapt": (_define_adapt, _run_adapt, "train experts for new domains and add them"),
    "experts list": (_define_experts_list, _run_experts_list, "what experts a run has"),
    "experts add": (_define_experts_add, _run_experts_add, "copy, average or take over experts"),
    "experts remove": (_define_experts_remove, _run_experts_remove, "with a receipt and a search"),
    "experts rename": (_define_experts_rename, _run_experts_rename, "give experts other names"),
    "experts merge": (_define_experts_merge, _run_experts_merge, "average experts into one"),
    "experts export": (_define_experts_export, _run_experts_export, "as safetensors files"),
    "experts import": (_define_experts_import, _run_experts_import, "from safetensors files"),
    "experts verify": (_define_experts_verify, _run_experts_verify, "check hashes and removals"),
    "materialize": (_define_materialize, _run_materialize, "one expert as a plain dense run"),
    "report": (_define_report, _run_report, "results as a page with plots"),
}
