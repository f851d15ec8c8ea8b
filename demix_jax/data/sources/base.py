"""How text enters the library: a source has parts, a part has documents.

A part is what one worker reads, so a large source has many. Parts are pickled and sent to other
processes or machines, and read there; whatever reads them, they yield the same documents in the
same order, and hold no more than one document at a time.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from demix_jax.errors import DemixError

SPLITS = ("train", "valid", "test")
SPLIT_NAMES = {name: name for name in SPLITS} | {
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
}


class Document(NamedTuple):
    """One text of one domain: the unit that is split, deduplicated and tokenized.

    Attributes:
        text: The text itself.
        id: A name that is unique within the domain and the same on every machine.
        split: "train", "valid" or "test", or None where the text's hash shall decide.
    """

    text: str
    id: str
    split: str | None = None


class Rows(NamedTuple):
    """What to take from rows: JSON objects or examples of a dataset.

    Attributes:
        field: Where the text is; `a/b` is field b of field a.
        where: Fields with the values, any of which a row must have, or it is left out.
    """

    field: str = "text"
    where: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def wants(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has the values that are asked for."""
        return all(_spell(value_of(row, field)) in values for field, values in self.where)


def _spell(value: Any) -> str:
    """A value as a condition has it: `true`, `3`, `text`, and nothing for one that is missing."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_where(conditions: Sequence[str]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """`field:value|value` of every condition; raises DemixError for another form."""
    parsed = []
    for condition in conditions:
        field, colon, values = condition.partition(":")
        if not (field and colon):
            raise DemixError(f"where={condition} is not FIELD:VALUE or FIELD:VALUE|VALUE")
        parsed.append((field, tuple(values.split("|"))))
    return tuple(parsed)


def value_of(row: Mapping[str, Any], path: str) -> Any:
    """The field at `a/b/c`, or None where there is none."""
    value: Any = row
    for name in path.split("/"):
        if not isinstance(value, Mapping) or name not in value:
            return None
        value = value[name]
    return value


class BadRecords:
    """The broken records met so far, of which some are tolerated.

    Attributes:
        allowed: How many may be skipped.
        places: What was wrong and where, one line each.
    """

    def __init__(self, allowed: int = 0) -> None:
        self.allowed = allowed
        self.places: list[str] = []

    def skip(self, place: str) -> None:
        """Takes note of a broken record; raises DemixError when it is one too many."""
        self.places.append(place)
        if len(self.places) > self.allowed:
            allowed = f" ({self.allowed} bad lines were allowed)" if self.allowed else ""
            raise DemixError(f"{self.places[-1]}{allowed}")


class Part(Protocol):
    """A piece of a source; picklable."""

    @property
    def size(self) -> int:
        """About how many bytes there are to read: for progress, and to start with the largest."""
        ...

    def documents(self, broken: BadRecords) -> Iterator[Document]:
        """Reads the part; raises DemixError for what cannot be read."""
        ...


class Source(Protocol):
    """The text of one domain."""

    def parts(self) -> Sequence[Part]:
        """Its parts, always the same ones in the same order; raises DemixError if it is empty."""
        ...

    def stamp(self) -> str:
        """Cheap to learn, and another one whenever the fingerprint may be another one."""
        ...

    def fingerprint(self) -> str:
        """A digest that changes when the documents, their order or the parts do."""
        ...


def hash_split(text: str) -> str:
    """90/5/5 by the SHA-256 of the text, so a document never changes its split."""
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32
    return "train" if share < 0.9 else "valid" if share < 0.95 else "test"


def digest(*values: Any) -> str:
    """16 hexadecimal digits that depend on every value: for stamps and fingerprints."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
