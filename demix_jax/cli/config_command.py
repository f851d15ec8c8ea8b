"""The verb that lists every field of a configuration: its flags and one call."""

from typing import Any

from demix_jax.cli.commands import Verb
from demix_jax.config.schema import Config, each_field, field_docs


def config_text(config: Config) -> str:
    """Returns a table of the fields: type, value, meaning, and which may change on resume."""
    rows = [
        (
            key + " *" * bool(field.metadata.get("free")),
            getattr(field.type, "__name__", "") if field.type != tuple[str, ...] else "list",
            _shown(getattr(section, field.name)),
            field_docs(type(section))[field.name],
        )
        for key, section, field in each_field(config)
    ]
    rows.insert(0, ("field", "type", "value", "meaning"))
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    lines = [
        f"{name:{widths[0]}}  {kind:{widths[1]}}  {value:15}  {meaning}".rstrip()
        for name, kind, value, meaning in rows
    ]
    lines += ["", "* may change when a run is resumed; every other field must stay the same"]
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value) or "()"
    return value if isinstance(value, str) and value else repr(value)


def _run_config(config: Config) -> None:
    print(config_text(config))


VERBS = {
    "config": Verb(lambda: None, _run_config, "list the fields of a config", configured=True),
}
