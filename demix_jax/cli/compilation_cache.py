"""Compiled programs on disk, read by every later command; trouble there never stops one.

JAX's persistent cache, in one folder for each kind of processor: XLA compiles for the very
instructions that the processor has, which JAX's keys do not name, and a home may be shared by
machines of several kinds.
"""

import builtins
import glob
import hashlib
import os
import platform
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from demix_jax.files import resolve_path

OFF = "off"
MAX_BYTES = 2 << 30  # of a processor's folder; the programs that were not used for longest go first
_ENABLED, _FOLDER = "JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_DIR"
_SETTINGS = {
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(MAX_BYTES),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",  # a train step has dozens of small helpers
}
_PROCESSOR = re.compile(r"^(?:model name|flags|CPU part|Features)\s*:.*", re.MULTILINE)
_TROUBLE = re.compile(
    r"Error (reading|writing) persistent compilation cache entry for '(.+?)': (\w+)"
)


def use_compilation_cache(place: str | None) -> None:
    """Chooses the cache of this process and its children; to be called before JAX is imported.

    Args:
      place: folder or URL, `off`, or None for the user's cache folder. With None, JAX's own
        variables for the cache count if they are set, and nothing is changed.
    """
    if place is None and {_ENABLED, _FOLDER} & os.environ.keys():
        return
    os.environ[_ENABLED] = "true"
    if place == OFF:
        os.environ[_ENABLED] = "false"
        return
    where = os.path.join(resolve_path(place or user_folder()), _processor())
    if "://" not in where and (reason := _open_folder(Path(where))):
        os.environ[_ENABLED] = "false"
        _warn(f"{where} {reason}: compiled programs are not kept")
        return
    os.environ[_FOLDER] = where
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    _listen(where)


def user_folder() -> str:
    """Returns the folder of the user's cache, which need not exist."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return os.path.join(home if os.path.isabs(home) else "~/.cache", "demix_jax", "xla")


def _processor() -> str:
    """Returns a name of the processor with all its instructions, the same on all like it."""
    try:
        found = _PROCESSOR.findall(Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        found = [platform.processor()]
    kind = platform.machine()
    return f"{kind}-{hashlib.sha256(repr(sorted(set(found))).encode()).hexdigest()[:12]}"


def _open_folder(folder: Path) -> str:
    """Makes the folder ready; returns the reason if programs cannot be kept there, else ""."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        # A killed process may leave a program without the time of its last use, over which JAX
        # would stumble at every later one.
        for program in folder.glob("*-cache"):
            used = program.with_name(program.name.removesuffix("-cache") + "-atime")
            if not used.exists():
                used.write_bytes(time.time_ns().to_bytes(8, "little"))
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return ""


def _listen(folder: str) -> None:
    """Takes over JAX's warnings: one for all that cannot be kept; damaged programs are deleted."""
    show, told = warnings.showwarning, False

    def listen(message: Warning | str, *where: Any, **more: Any) -> None:
        nonlocal told
        if not (found := _TROUBLE.match(str(message))):
            show(message, *where, **more)
            return
        doing, program, kind = found.groups()
        problem = getattr(builtins, kind, Exception)
        if doing == "reading" and kind != "Timeout" and not issubclass(problem, OSError):
            for file in Path(folder).glob(f"{glob.escape(program)}-*-cache"):
                file.unlink(missing_ok=True)  # it is compiled and written anew
        elif not told:
            told = True
            _warn(f"{folder} cannot be used ({kind}): some compiled programs are not kept")

    warnings.filterwarnings("always", _TROUBLE.pattern)
    warnings.showwarning = listen


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
