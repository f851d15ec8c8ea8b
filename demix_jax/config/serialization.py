"""Configurations as JSON and by key: saved with a run, hashed, and compared when it is resumed."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demix_jax.config.schema import Config, each_field
from demix_jax.errors import DemixError, suggest
from demix_jax.files import resolve_path
from demix_jax.typed_files import from_json, parse_json, read_bytes, reading

_IMPORTS = re.compile(r"=\s*seqio:|\?\s*import=")  # the module of a SeqIO task, or one for TFDS
_REMOVED = ("train.replicas",)  # fields that saved runs may have, at their default


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the configuration as nested JSON-ready dictionaries."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any]) -> Config:
    """Returns the configuration of `to_dict`; raises DemixError for a key that no field has."""
    config = Config()
    fields = {key: (section, field.name) for key, section, field in each_field(config)}
    current = {_saved_key(key, field): key for key, _, field in each_field(config)}
    for saved, value in _flatten(values):
        if saved in _REMOVED and not value:
            continue
        key = current.get(saved, saved)
        if key not in fields:
            raise DemixError(unknown_key(key))
        setattr(*fields[key], tuple(value) if isinstance(value, list) else value)
    return config.validate()


def read_saved(path: Path) -> Config:
    """Reads the configuration of a saved run, its `run.json`, or a JSON file of the same fields.

    Nothing in it is run, unlike a Python file; so it may name no module to be imported either.

    Raises:
      DemixError: a file that is not JSON, an unknown field, a value of another type or out of
        range, or a domain whose source imports a module of Python.
    """
    with reading(path, "give the run.json of a run, or a Python file"):
        values = parse_json(read_bytes(path), dict[str, Any])
        config = from_dict(from_json(values.get("config", values), dict[str, Any], "config"))
    if importing := [source for source in config.data.sources if _IMPORTS.search(source)]:
        raise DemixError(
            f"{path}: data.sources {importing[0]!r} imports a module of Python, which a saved "
            "configuration may not; use a Python file that you trust"
        )
    return config


def flat(config: Config) -> dict[str, Any]:
    """Returns the value of every field by its key, such as "train.steps", JSON-ready."""
    return dict(_flatten(to_dict(config)))


def resolve_paths(config: Config) -> Config:
    """Returns the configuration after resolving each path in it that is not empty."""
    for _, section, field in each_field(config):
        if field.metadata.get("path"):
            setattr(section, field.name, resolve_path(getattr(section, field.name)))
    return config


def config_hash(config: Config) -> str:
    """Returns a hex digest of every field that decides what is computed."""
    values, defaults = flat(config), flat(Config())
    hashed = {
        _saved_key(key, field): values[key]
        for key, _, field in each_field(config)
        if not field.metadata.get("free")
        and not (field.metadata.get("later") and values[key] == defaults[key])
    }
    return hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Config, new: Config) -> list[str]:
    """Returns lines "key: old -> new" for the fields that a resumed run must not change."""
    before, after = flat(old), flat(new)

    def differ(key: str, field: dataclasses.Field) -> bool:
        values = before[key], after[key]
        one, other = map(resolve_path, values) if field.metadata.get("path") else values
        return one != other

    return [
        f"{key}: {before[key]!r} -> {after[key]!r}"
        for key, _, field in each_field(old)
        if not field.metadata.get("free") and differ(key, field)
    ]


def unknown_key(key: str) -> str:
    """Returns the message for an unknown configuration key, with the nearest valid one."""
    valid = [name for name, _, _ in each_field(Config())]
    return f"unknown config key {key!r}{suggest(key, valid)} (valid keys: {', '.join(valid)})"


def field_type(key: str) -> Any:
    """Returns the type of the field named `key`; raises DemixError if there is none."""
    for name, _, field in each_field(Config()):
        if name == key:
            return field.type
    raise DemixError(unknown_key(key))


def _saved_key(key: str, field: dataclasses.Field) -> str:
    """Returns the key that a field had when it was first saved, which hashes go by."""
    section, dot, name = key.rpartition(".")
    return f"{section}{dot}{field.metadata.get('formerly') or name}"


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values of nested dictionaries by their dotted keys."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
