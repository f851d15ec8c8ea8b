"""The kind of a file of a domain, by its own name alone: JSON lines, a table, or a document.

What people and programs leave beside data is left out, and what cannot be told apart is refused:
no file decides what the others are. docs/data.md states the rule.
"""

import re
from collections.abc import Iterable

from demix_jax.errors import DemixError

COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz")
_LINES = (".jsonl", ".ndjson")  # and .json if it is compressed, or named
_TABLES = (".parquet", ".arrow", ".feather")
LINES, TABLES, TEXTS = "JSON lines", "tables", "documents"  # what the files of a domain are
_LITTER = re.compile(
    r"""readme([._ -].*)?
    | (licen[cs]e|copying|notice|changelog|citation|contributing|authors)([._ -].*)?
    | (md5|sha\d+)sums?(\..*)? | checksums?(\..*)?
    | (eh)?thumbs\.db | desktop\.ini | .*:zone\.identifier
    | _[^_.][^.]*  # _SUCCESS, _committed_123, _metadata
    | .*~ | \#.*\# | .*\.(bak|orig|lock|md5|sha\d+|crc|asc|sig)""",
    re.IGNORECASE | re.VERBOSE,
)
_LITTER_FOLDERS = frozenset(
    ("__macosx", "__pycache__", "_delta_log", "_spark_metadata", "_temporary", "@eadir")
    + ("$recycle.bin", "lost+found", "system volume information")
)
_UNFINISHED = (".part", ".partial", ".tmp", ".temp", ".crdownload", ".download", ".filepart")
_NO_TEXT = (
    (".tar", ".tgz", ".zip", ".7z", ".rar", ".lz4", ".lzma", ".br", ".z", ".sz", ".lzo")
    + (".avro", ".orc", ".tfrecord", ".tfrecords", ".mds")
    + (".npy", ".npz", ".h5", ".hdf5", ".pkl", ".pt", ".db", ".sqlite", ".xls", ".xlsx")
    + (".pdf", ".doc", ".docx", ".epub", ".png", ".jpg", ".jpeg", ".gif")
)


def is_hidden(name: str) -> bool:
    """Returns True if a file, or a folder above it, is hidden; names are below the source."""
    return any(part.startswith(".") or not part for part in name.split("/"))


def is_litter(name: str) -> bool:
    """Returns True for what people and programs leave beside data, such as `README.md`."""
    *folders, last = name.split("/")
    if any(is_litter_folder(folder) for folder in folders):
        return True
    return bool(_LITTER.fullmatch(last)) and not _stem(last).lower().endswith(_LINES)


def is_litter_folder(name: str) -> bool:
    """Returns True for a folder that programs make beside data, such as `__pycache__`."""
    return name.lower() in _LITTER_FOLDERS


def domain_of(name: str) -> str | None:
    """Returns the domain that a file of rows in a folder of domains is named after, if it is one.

    Files of rows are JSON lines and tables.
    """
    stem = _stem(name)
    endings = (*_LINES, *_TABLES) if stem == name else (*_LINES, ".json")
    ending = next((e for e in endings if stem.lower().endswith(e)), None)
    return stem[: -len(ending)] if ending else None


def is_table(name: str) -> bool:
    """Returns True for a file whose rows are those of a table."""
    return name.lower().endswith(_TABLES)


def check_ending(place: str, name: str) -> None:
    """Raises DemixError for a copy, a piece or an unknown compression of JSON lines."""
    if not is_litter(name) and re.search(r"\.(json|jsonl|ndjson)[^a-z0-9]", name.lower()):
        raise DemixError(
            f"{place} has {name}, whose name does not end like JSON lines (.jsonl, also with "
            f"{', '.join(COMPRESSIONS)}); rename it or move it elsewhere"
        )


def kind_of(place: str, names: Iterable[str]) -> str:
    """Returns what the files of a source are: LINES, TABLES or TEXTS.

    Args:
      place: path, URL or pattern as it was typed.
      names: names of its files.

    Raises:
      DemixError: a file that is none of them, one that can be several, files of two kinds, or one
        file compressed and not.
    """
    first: dict[str, str] = {}
    contents: dict[str, str] = {}
    for name in names:
        first.setdefault(_kind(place, name), name)
        other = contents.setdefault(_stem(name), name)
        if other != name:
            raise DemixError(
                f"{place} has {other} and {name}, which seem to be the same text; move one away"
            )
    if len(first) > 1:
        kinds = sorted(first, key=(LINES, TABLES, TEXTS).index)
        others = ", ".join(
            f"{'others' if kind == TEXTS else kind} ({first[kind]})" for kind in kinds[1:]
        )
        ending = "*.jsonl" if kinds[0] == LINES else "*.parquet"
        raise DemixError(
            f"{place} has files of {kinds[0]} ({first[kinds[0]]}) and {others}; move one kind "
            f"elsewhere, or name one by a pattern: NAME=FOLDER/**/{ending}"
        )
    return next(iter(first), TEXTS)


def _kind(place: str, name: str) -> str:
    last = name.rpartition("/")[2].lower()
    if is_table(last):
        return TABLES
    if domain_of(last) is not None or (last.endswith(".json") and place.lower().endswith(".json")):
        return LINES
    if last.endswith(".json"):
        raise DemixError(
            f"{place} has {name}, which can be JSON lines or a description of other files; rename "
            "it to .jsonl or move it elsewhere, or name the files by a pattern: NAME=FOLDER/*.jsonl"
        )
    check_ending(place, name)
    if last.endswith(_UNFINISHED):
        raise DemixError(
            f"{place} has {name}, which looks like an unfinished copy; finish it or move it away"
        )
    if _stem(last).endswith(_NO_TEXT + _TABLES) or last.endswith(_NO_TEXT):
        raise DemixError(
            f"{place} has {name}, which is no text; make JSON lines of it or move it elsewhere"
        )
    return TEXTS


def _stem(name: str) -> str:
    """Returns a name without the ending of its compression."""
    ending = next((e for e in COMPRESSIONS if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)]
