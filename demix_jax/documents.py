"""A document: the unit in which text enters the library."""

from typing import NamedTuple


class Document(NamedTuple):
    """One text of one domain.

    Attributes:
        text: The text itself.
        id: A name that is unique within the domain and the same on every machine.
        split: "train", "valid" or "test", or None where the reader has yet to choose.
    """

    text: str
    id: str
    split: str | None = None
