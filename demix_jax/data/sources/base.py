"""Sources of text, their parts, and documents.

A part is what one worker reads, so a large source has many. Parts are pickled and sent to other
processes or machines; whatever reads them, they yield the same documents in the same order, and
hold no more than one document at a time.
"""

import codecs
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from demix_jax.errors import DemixError

SPLITS = ("train", "valid", "test")
SPLIT_NAMES = {name: name for name in SPLITS} | {
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
}
_MESSAGE_CHARACTERS = 300  # of another library's error
_OTHER_MARKS = (  # the longest first: one begins another
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)

Where = tuple[tuple[str, tuple[str, ...]], ...]  # fields, each with the values it may have


class Document(NamedTuple):
    """One text of one domain: the unit that is split, deduplicated and tokenized.

    Attributes:
        text: text of the document.
        id: name that is unique within the domain and the same on every machine.
        split: "train", "valid" or "test"; None to decide by the hash of the text.
    """

    text: str
    id: str
    split: str | None = None


class Selection(NamedTuple):
    """The field that is the text, and the conditions that an example has to meet.

    Attributes:
        field: path of the text; `a/b` is field b of field a.
        where: paths of fields, each with the values of which an example must have one.
    """

    field: str = "text"
    where: Where = ()


def parse_where(conditions: Sequence[str]) -> Where:
    """Parses conditions `field:value|value`; raises DemixError for another form."""
    parsed = []
    for condition in conditions:
        field, colon, values = condition.partition(":")
        if not (field and colon):
            raise DemixError(f"where={condition} is not FIELD:VALUE or FIELD:VALUE|VALUE")
        parsed.append((field, tuple(values.split("|"))))
    return tuple(parsed)


def matches(example: Mapping[str, Any], where: Where, spell: Callable[[Any], str]) -> bool:
    """Returns True if an example has one of the values of every condition, as `spell` spells it."""
    return all(spell(value_of(example, field)) in values for field, values in where)


def value_of(example: Any, path: str) -> Any:
    """Returns the field at `a/b/c`, or None; the name of a field may itself have slashes."""
    if not isinstance(example, Mapping):
        return None
    if path in example:
        return example[path]
    first, slash, rest = path.partition("/")
    return value_of(example.get(first), rest) if slash else None


def make_document(row: Any, place: str, selection: Selection) -> Document | None:
    """Returns the document of a row, or None if it does not meet the conditions.

    Args:
      row: object with the text, and perhaps with its `id` and `split`.
      place: id of a document that has none.
      selection: field of the text, and conditions.

    Raises:
      DemixError: no object, no text, or a split that is not known.
    """
    if isinstance(row, dict) and not matches(row, selection.where, spell_json):
        return None
    text = value_of(row, selection.field)
    if not isinstance(text, str):
        fields = f" (its fields: {', '.join(row)})" if isinstance(row, dict) and row else ""
        raise DemixError(f"expected an object with a string field {selection.field!r}{fields}")
    split = row.get("split")
    if split is not None and not (isinstance(split, str) and split in SPLIT_NAMES):
        raise DemixError(f"unknown split {split!r}; use {', '.join(SPLIT_NAMES)}")
    given = row.get("id")
    own = place if given is None else str(given)
    document = Document(text, own, split and SPLIT_NAMES[split])
    for field, value in ((selection.field, text), ("id", "" if given is None else own)):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise DemixError(f"field {field!r} has a lone surrogate, which is no UTF-8") from None
    return document


def spell_json(value: Any) -> str:
    """Returns a value as conditions spell it: JSON's `true`, `3`, `text`; "" for null."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


class BadRecords:
    """The broken records met so far, of which some are tolerated.

    Attributes:
        allowed: number of broken records that may be skipped.
        messages: error and position of each broken record, one line each.
    """

    def __init__(self, allowed: int = 0) -> None:
        self.allowed = allowed
        self.messages: list[str] = []

    def skip(self, message: str) -> None:
        """Records a broken record; raises DemixError if it is one too many."""
        self.messages.append(message)
        if len(self.messages) > self.allowed:
            allowed = f" ({self.allowed} bad lines were allowed)" if self.allowed else ""
            raise DemixError(f"{message}{allowed}")


class Part(Protocol):
    """A piece of a source; picklable."""

    @property
    def size(self) -> int:
        """Returns about how many bytes there are to read."""
        ...

    def documents(self, broken: BadRecords) -> Iterator[Document]:
        """Reads the part; raises DemixError for what cannot be read."""
        ...


class Source(Protocol):
    """The text of one domain."""

    def parts(self) -> Sequence[Part]:
        """Returns the parts, always in the same order; raises DemixError if there is none."""
        ...

    def cheap_fingerprint(self) -> str:
        """Returns a cheap proxy that changes whenever the fingerprint might."""
        ...

    def fingerprint(self) -> str:
        """Returns a digest that changes when the documents, their order or the parts do."""
        ...


def decode_text(data: bytes) -> str:
    """Decodes UTF-8, without a byte order mark; raises DemixError for bytes that are not UTF-8."""
    for mark, encoding in _OTHER_MARKS:
        if data.startswith(mark):
            raise DemixError(f"{encoding}, not UTF-8; convert it: iconv -f {encoding} -t UTF-8")
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DemixError(f"invalid UTF-8 at byte {error.start}") from None


def hash_split(text: str) -> str:
    """Returns the split of a text by its SHA-256: 90 % train, 5 % valid, 5 % test."""
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4]) / 2**32
    return "train" if share < 0.9 else "valid" if share < 0.95 else "test"


def digest(*values: Any) -> str:
    """Returns 16 hexadecimal digits that depend on every value."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def one_line(error: BaseException) -> str:
    """Returns another library's message, on one line and not too long."""
    words = " ".join(str(error).split()) or type(error).__name__
    half = _MESSAGE_CHARACTERS // 2
    return words if len(words) <= 2 * half else f"{words[:half]} ... {words[-half:]}"
