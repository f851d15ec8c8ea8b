"""Configurations as JSON, by key, and compared: what is saved with a run, and what may change."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from demix_jax.config.schema import Config
from demix_jax.errors import DemixError, suggest

_REMOVED = ("train.replicas",)  # fields that saved runs may have, at their default


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as nested JSON-ready dictionaries."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `to_dict`; raises DemixError for a key that no field has."""
    config = Config()
    current = {_saved_key(key, field): key for key, field in _keys(config)}
    for key, value in _flatten(values):
        if key in _REMOVED and not value:
            continue
        key = current.get(key, key)
        field_type(key)  # refuses an unknown key
        *sections, name = key.split(".")
        holder: Any = config
        for section in sections:
            holder = getattr(holder, section)
        setattr(holder, name, tuple(value) if isinstance(value, list) else value)
    return config.validate()


def flat(config: Config) -> dict[str, Any]:
    """Every field by its key, such as "train.steps"."""
    return dict(_flatten(to_dict(config)))


def config_hash(config: Config) -> str:
    """Hex digest of every field that decides what is computed."""
    fields, default = dict(_keys(config)), dict(_flatten(to_dict(Config())))
    values = {
        _saved_key(key, fields[key]): value
        for key, value in _flatten(to_dict(config))
        if not fields[key].metadata.get("free")
        and not (fields[key].metadata.get("later") and value == default[key])
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def differences(old: Config, new: Config) -> list[str]:
    """Lines "key: old -> new" for every field that a resumed run must not change."""
    free = {key for key, field in _keys(old) if field.metadata.get("free")}
    old_values, new_values = dict(_flatten(to_dict(old))), dict(_flatten(to_dict(new)))
    return [
        f"{key}: {value!r} -> {new_values[key]!r}"
        for key, value in old_values.items()
        if key not in free and value != new_values[key]
    ]


def unknown_key(key: str) -> str:
    """The message for an unknown configuration key, naming the nearest valid one."""
    valid = [name for name, _ in _keys(Config())]
    return f"unknown config key {key!r}{suggest(key, valid)} (valid keys: {', '.join(valid)})"


def field_type(key: str) -> Any:
    """The type of the field named `key`, such as "train.steps"; raises DemixError if unknown."""
    for name, field in _keys(Config()):
        if name == key:
            return field.type
    raise DemixError(unknown_key(key))


def _saved_key(key: str, field: dataclasses.Field) -> str:
    """Returns the key that a field had when it was first saved, which hashes go by."""
    section, dot, name = key.rpartition(".")
    return f"{section}{dot}{field.metadata.get('formerly') or name}"


def _keys(holder: Any, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    for field in dataclasses.fields(holder):
        value = getattr(holder, field.name)
        if dataclasses.is_dataclass(value):
            yield from _keys(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
