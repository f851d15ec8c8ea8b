"""`demix <verb>`: flags to configuration to one call."""

import itertools
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags
from ml_collections import config_flags

from demix_jax.cli import commands, expert_commands, plan_command
from demix_jax.cli.commands import Verb, define_data_dir
from demix_jax.config.schema import Config
from demix_jax.config.serialization import field_type
from demix_jax.errors import DemixError, suggest

_VERBS = {
    "prepare": commands.PREPARE,
    "plan": plan_command.PLAN,
    "train": commands.TRAIN,
    "evaluate": commands.EVALUATE,
    "score": commands.SCORE,
    "adapt": commands.ADAPT,
    "experts list": expert_commands.LIST,
    "experts add": expert_commands.ADD,
    "experts remove": expert_commands.REMOVE,
    "experts rename": expert_commands.RENAME,
    "experts merge": expert_commands.MERGE,
    "experts export": expert_commands.EXPORT,
    "experts import": expert_commands.IMPORT,
    "experts verify": expert_commands.VERIFY,
    "materialize": expert_commands.MATERIALIZE,
    "report": commands.REPORT,
}


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
        arguments = _overrides(arguments)
        names = _define(_VERBS[verb])
        if {"-h", "--help"} & set(arguments[2:]):
            print(_help(verb, names))
            sys.exit(0)
        if _VERBS[verb].configured:
            _check_config_file(arguments[2:])
        quiet = [f"demix {verb}", "--verbosity=-1"]  # at INFO, Orbax narrates every file
        app.run(
            lambda rest: _call(verb, rest),
            argv=[*quiet, *arguments[2:]],
            flags_parser=lambda given: _parse(verb, given),
        )
    except DemixError as error:
        _fail(verb, error)
    sys.exit(0)


def _define(verb: Verb) -> set[str]:
    """Defines the flags of a verb; returns their names."""
    others = set(flags.FLAGS)
    if verb.configured:
        _define_config()
    verb.define()
    return set(flags.FLAGS) - others


def _parse(verb: str, arguments: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        missing = re.match(r"flag --(\w+)=None: ", str(error))
        text = f"--{missing[1]} is required" if missing else str(error).splitlines()[0]
        _fail(verb, DemixError(f"{text}; `demix {verb} --help` lists all flags"))


def _help(verb: str, names: Iterable[str]) -> str:
    """What a verb does and the flags that it defines."""
    lines = [f"usage: demix {verb} [--flags]: {_VERBS[verb].about}", ""]
    for name in sorted(names):
        flag = flags.FLAGS[name]
        shown = (flag.default_as_str or "").strip("'")
        default = f" (default: {shown})" if shown else ""
        lines.append(f"  --{name:17} {flag.help}{default}")
    return "\n".join(lines)


def _call(verb: str, rest: Sequence[str]) -> None:
    if len(rest) > 1:
        _fail(verb, DemixError(f"unexpected argument {rest[1]!r}; flags start with --"))
    _, run, _, configured = _VERBS[verb]
    try:
        if configured:
            run(_config())
        else:
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
    lines = "\n".join(f"  {name:15} {verb.about}" for name, verb in _VERBS.items())
    return f"usage: demix <verb> [--flags]\n\n{lines}\n\n`demix <verb> --help` lists its flags."


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
    define_data_dir("prepared data; default: data.dir of the config")


def _check_config_file(arguments: Sequence[str]) -> None:
    """Raises DemixError for a --config that does not exist; loading one begins while parsing."""
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        name, equals, path = argument.partition("=")
        path = path if equals else following
        if name in ("--config", "-config") and path is not None and not Path(path).is_file():
            choices = ", ".join(sorted(str(p) for p in Path("configs").glob("*.py")))
            raise DemixError(
                f"config file {path!r} does not exist (configs: {choices or 'none here'})"
            )


def _config() -> Config:
    path = flags.FLAGS["config"].config_filename
    config = flags.FLAGS.config
    if not isinstance(config, Config):
        raise DemixError(f"{path}: get_config() must return a demix_jax Config, not {config!r}")
    if flags.FLAGS.data_dir:
        config.data.dir = flags.FLAGS.data_dir
    return config.validate()
