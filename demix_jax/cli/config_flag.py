"""The flag --config: an experiment of one's own or a shipped one, and overrides of its fields."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

import demix_jax
from demix_jax.cli import saved_config
from demix_jax.cli.settings_flags import check_not_empty, define_data_dir
from demix_jax.config.schema import Config
from demix_jax.config.serialization import field_type, read_saved, resolve_paths
from demix_jax.errors import DemixError, suggest
from demix_jax.files import resolve_path


def define_config() -> None:
    """Defines --config and --data_dir, which replaces its data.dir."""
    config_flags.DEFINE_config_file(
        "config",
        None,
        "Experiment: a Python file, which is run; a run's folder or its run.json, which is only "
        "read; or a shipped one such as quick. --config.train.steps=20 overrides a field, and "
        "`demix config` lists them.",
    )
    define_data_dir("prepared data; default: data.dir of the config")


def shipped_configs() -> dict[str, Path]:
    """Returns the experiments that come with the package, by name."""
    package = Path(demix_jax.__file__).parent
    folders = (package / "configs", package.parent / "configs")  # of a wheel, of a checkout
    paths = next((found for folder in folders if (found := sorted(folder.glob("*.py")))), [])
    return {path.stem: path for path in paths}


def resolve_arguments(arguments: Sequence[str]) -> list[str]:
    """Returns the arguments with --config as a file and its overrides as config_flags reads them.

    Raises:
      DemixError: no such file or shipped experiment, an override of an unknown field, or one
        without --config.
    """
    resolved: list[str] = []
    left = iter(arguments)
    for argument in left:
        flag = re.fullmatch(r"--?(no)?(config(?:\.[\w.]+)?)(?:=(.*))?", argument, re.DOTALL)
        if flag is None:
            resolved.append(argument)
            continue
        off, name, value = flag.groups()
        kind = field_type(name.removeprefix("config.")) if name != "config" else str
        if value is None and kind is not bool and not off:
            value = next(left, None)
        if value is None or off:
            resolved.append(argument)
            continue
        check_not_empty(name, value)
        resolved.append(f"--{name}={_find(value) if name == 'config' else _literal(kind, value)}")
    overrides = [argument for argument in resolved if argument.startswith("--config.")]
    if overrides and not any(re.match(r"--config(=|$)", argument) for argument in resolved):
        raise DemixError(f"{overrides[0]} overrides a config; give one too, such as --config quick")
    return resolved


def read_config() -> Config:
    """Returns the checked configuration of the flags; without --config, the defaults."""
    config = flags.FLAGS.config
    if config is None:
        config = Config()
    if not isinstance(config, Config):
        path = flags.FLAGS["config"].config_filename
        raise DemixError(f"{path}: get_config() must return a demix_jax Config, not {config!r}")
    if flags.FLAGS.data_dir:
        config.data.dir = flags.FLAGS.data_dir
    return resolve_paths(config.validate())


def _find(path: str) -> Path | str:
    """Returns the file, or the shipped experiment called NAME or configs/NAME.py.

    Of a run or its JSON file it is the Python file that reads it, and ":FILE" behind. JSON is never
    run.
    """
    file = Path(resolve_path(path))
    if (file / "run.json").is_file():
        file /= "run.json"
    if file.is_file():
        if file.suffix == ".json":
            read_saved(file)  # for its errors: those of a Python file come with a traceback
            return f"{saved_config.__file__}:{file}"
        return file
    shipped = shipped_configs()
    name = Path(path).stem
    if name in shipped and path in (name, f"configs/{name}.py"):
        return str(shipped[name])
    raise DemixError(
        f"config file {path!r} does not exist{suggest(name, shipped)} "
        f"(shipped configs: {', '.join(shipped)})"
    )


def _literal(kind: Any, value: str) -> str:
    """Returns the value of an override, a list as the tuple literal that config_flags reads."""
    if kind == tuple[str, ...] and not value.startswith("("):
        return repr((value,))
    return value
