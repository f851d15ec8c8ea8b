"""`demix <verb>`: flags to configuration to one call."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from demix_jax.config import Config, known_key, unknown_key
from demix_jax.errors import DemixError, suggest


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Runs one verb; a DemixError becomes one line on stderr and exit status 2."""
    arguments = list(sys.argv if argv is None else argv)
    verb = arguments[1] if len(arguments) > 1 else ""
    if verb in ("", "-h", "--help", "help"):
        print(_usage())
        sys.exit(0 if verb else 2)
    try:
        if verb not in _VERBS:
            raise DemixError(f"unknown verb {verb!r}{suggest(verb, _VERBS)}\n{_usage()}")
        define, run, _ = _VERBS[verb]
        _check_overrides(arguments)
        define()
        quiet = [f"demix {verb}", "--verbosity=-1"]  # at INFO, Orbax narrates every file
        app.run(lambda rest: _call(verb, run, rest), argv=[*quiet, *arguments[2:]])
    except DemixError as error:
        _fail(verb, error)
    sys.exit(0)


def _call(verb: str, run: Callable[[], object], rest: Sequence[str]) -> None:
    if len(rest) > 1:
        _fail(verb, DemixError(f"unexpected argument {rest[1]!r}; flags start with --"))
    try:
        run()
    except DemixError as error:
        _fail(verb, error)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        _fail(verb, DemixError(f"{error.strerror}: {error.filename or 'while writing'}"))


def _fail(verb: str, error: Exception) -> NoReturn:
    sys.stdout.flush()
    print(f"demix {verb}: error: {error}", file=sys.stderr)
    sys.exit(2)


def _usage() -> str:
    verbs = "\n".join(f"  {name:9} {about}" for name, (_, _, about) in _VERBS.items())
    return f"usage: demix <verb> [--flags]\n\n{verbs}\n\n`demix <verb> --help` lists its flags."


def _check_overrides(arguments: Sequence[str]) -> None:
    """Refuses --config.some.key for a key that no field has, naming the nearest one."""
    for argument in arguments:
        name = argument.lstrip("-").split("=")[0]
        prefix, dot, key = name.removeprefix("no").partition(".")
        if argument.startswith("-") and prefix + dot == "config." and not known_key(key):
            raise DemixError(unknown_key(key))


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


def _run_prepare() -> None:
    from demix_jax.prepare import prepare

    prepare(_config())


def _define_train() -> None:
    _define_config()
    flags.DEFINE_string("workdir", None, "Folder of the run; the same command again resumes it.")
    flags.mark_flag_as_required("workdir")


def _run_train() -> None:
    from demix_jax.train import train

    train(_config(), Path(flags.FLAGS.workdir))


def _define_evaluate() -> None:
    flags.DEFINE_list("workdir", None, "Runs to evaluate, comma-separated.")
    flags.DEFINE_string("out", None, "Folder for results.json.")
    flags.DEFINE_list("domains", [], "Domains; default: those each run was trained on.")
    flags.DEFINE_enum("split", "test", ["train", "valid", "test"], "Held-out text to read.")
    flags.DEFINE_integer("tokens", 0, "Per domain, in whole documents; 0: all.", lower_bound=0)
    flags.DEFINE_integer("batch_size", 16, "Sequences scored at once.", lower_bound=1)
    _define_data_dir("prepared data; default: what each run was trained on")
    flags.mark_flags_as_required(["workdir", "out"])


def _run_evaluate() -> None:
    from demix_jax.evaluate import evaluate

    evaluate(
        [Path(workdir) for workdir in flags.FLAGS.workdir],
        Path(flags.FLAGS.out),
        data_dir=flags.FLAGS.data_dir,
        domains=flags.FLAGS.domains,
        split=flags.FLAGS.split,
        tokens=flags.FLAGS.tokens,
        batch_size=flags.FLAGS.batch_size,
    )


_VERBS: dict[str, tuple[Callable[[], None], Callable[[], None], str]] = {
    "prepare": (_define_config, _run_prepare, "tokenize domains into flat token files"),
    "train": (_define_train, _run_train, "train or resume a run"),
    "evaluate": (_define_evaluate, _run_evaluate, "score every expert on held-out text"),
}
