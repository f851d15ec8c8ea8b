"""`demix <verb>`: flags to configuration to one call."""

import os
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import NoReturn

from absl import app, flags

from demix_jax.cli import (
    commands,
    config_command,
    expert_commands,
    generate_command,
    interop_commands,
    lm_eval_command,
    plan_command,
    serve_command,
)
from demix_jax.cli.commands import Verb
from demix_jax.cli.compilation_cache import use_compilation_cache
from demix_jax.cli.config_flag import define_config, read_config, resolve_arguments
from demix_jax.cli.settings_flags import check_not_empty
from demix_jax.errors import DemixError, explain_memory, suggest

_VERBS = {
    **config_command.VERBS,
    **plan_command.VERBS,
    **commands.VERBS,
    **generate_command.VERBS,
    **lm_eval_command.VERBS,
    **serve_command.VERBS,
    **expert_commands.VERBS,
    **interop_commands.VERBS,
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
            print(_usage(), file=sys.stderr)
            raise DemixError(f"unknown verb {verb!r}{suggest(verb, _VERBS)}")
        names = _define(_VERBS[verb])
        if {"-h", "--help"} & set(arguments[2:]):
            print(_help(verb, names))
            sys.exit(0)
        if _VERBS[verb].configured:
            arguments = resolve_arguments(arguments)
        quiet = [f"demix {verb}", "--verbosity=-1"]  # at INFO, Orbax narrates every file
        app.run(
            lambda rest: _call(verb, rest),
            argv=[*quiet, *arguments[2:]],
            flags_parser=lambda given: _parse(verb, given, names),
        )
    except DemixError as error:
        _fail(verb, error)
    sys.exit(0)


def _define(verb: Verb) -> set[str]:
    """Defines the flags of a verb; returns their names."""
    others = set(flags.FLAGS)
    if verb.configured:
        define_config()
    verb.define()
    about = "Folder of compiled programs; off: none. Default: JAX_COMPILATION_CACHE_DIR, else the "
    flags.DEFINE_string("compilation_cache", None, f"{about}user's cache folder.")
    flags.mark_flags_as_required(verb.required)
    return set(flags.FLAGS) - others


def _parse(verb: str, arguments: Sequence[str], names: Iterable[str]) -> list[str]:
    try:
        rest = flags.FLAGS(arguments)
        for name in sorted(names):
            if flags.FLAGS[name].present:
                check_not_empty(name, flags.FLAGS[name].value)
        return rest
    except DemixError as error:
        _fail(verb, error)
    except flags.Error as error:
        trace, _, own = str(error).rpartition(f"{DemixError.__module__}.DemixError: ")
        if trace:  # which config_flags puts before what a configuration raises
            _fail(verb, DemixError(own.removesuffix(r"\n")))
        missing = re.match(r"flag --(\w+)=None: ", str(error))
        text = f"--{missing[1]} is required" if missing else str(error).splitlines()[0]
        _fail(verb, DemixError(f"{text}; `demix {verb} --help` lists all flags"))


def _help(verb: str, names: Iterable[str]) -> str:
    """Returns the usage of a verb and the flags that it defines, required ones first."""
    lines = [f"usage: demix {verb} [--flags]: {_VERBS[verb].about}", ""]
    required = _VERBS[verb].required
    for name in sorted(names, key=lambda name: (name not in required, name)):
        flag = flags.FLAGS[name]
        shown = (flag.default_as_str or "").strip("'")
        default = f" (default: {shown})" if shown not in ("", "None") else ""
        about = f"{'(required) ' * (name in required)}{flag.help}{default}"
        lines += textwrap.wrap(
            f"  --{name:17} {about}", width=100, subsequent_indent=" " * 22, break_on_hyphens=False
        )
    return "\n".join(lines)


def _call(verb: str, rest: Sequence[str]) -> None:
    if len(rest) > 1:
        _fail(verb, DemixError(f"unexpected argument {rest[1]!r}; flags start with --"))
    use_compilation_cache(flags.FLAGS.compilation_cache)
    try:
        with explain_memory():
            if _VERBS[verb].configured:
                _VERBS[verb].run(read_config())
            else:
                _VERBS[verb].run()
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
