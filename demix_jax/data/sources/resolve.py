"""The domains of a configuration and their sources of text.

`data.sources` holds places that have several domains, and domains by name:

    embedded                  the corpus that every installation holds, see `embedded.py`
    FOLDER                    each <domain>.jsonl[.gz|...] file and each <domain>/ folder in it
    NAME=PLACE                files, a folder or a pattern, see `data/sources/text_files.py`
    NAME=tfds:DATASET         a TensorFlow dataset, see `data/sources/tfds_source.py`
    NAME=seqio:MODULE:TASK    a SeqIO task, see `data/sources/seqio_source.py`
    NAME=hf:DATASET[:CONFIG]  a Hugging Face dataset or a folder, see `data/sources/hub_source.py`

A place may end in options, `?field=body&where=language:en`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator

from demix_jax.config.schema import DataConfig, check_names
from demix_jax.data.sources import embedded
from demix_jax.data.sources.base import BadRecords, Document, Part, Selection, Source, parse_where
from demix_jax.data.sources.file_kinds import check_ending, domain_of, is_litter_folder, is_table
from demix_jax.data.sources.hub_source import HubSource
from demix_jax.data.sources.listing import list_folder
from demix_jax.data.sources.seqio_source import SeqioSource
from demix_jax.data.sources.text_files import TextFiles
from demix_jax.data.sources.tfds_source import TfdsSource
from demix_jax.errors import DemixError, suggest
from demix_jax.files import resolve_path

_NAMED = re.compile(r"([^=:/?*]+)=(.+)", re.DOTALL)
_OPTIONS = re.compile(r"(.*?)\?(\w+=[^?]*)", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Domains:
    """All domains of a configuration: their sources, and names of training and novel domains."""

    sources: dict[str, Source]
    train: tuple[str, ...]
    novel: tuple[str, ...]


def find_domains(config: DataConfig) -> Domains:
    """Finds the domains that `config` asks for in all of its sources; reads no text.

    Raises:
      DemixError: a source that does not exist or is empty, options it does not have, a name that
        repeats, or a named domain that no source has.
    """
    openers: dict[str, Callable[[], Source]] = {}
    for place in config.sources:
        for name, opener in _domains_in(place, config):
            if name in openers:
                raise DemixError(f"domain {name!r} is found twice in {', '.join(config.sources)}")
            openers[name] = opener
    check_names(tuple(openers))
    for name in config.train_domains + config.novel_domains:
        if name not in openers:
            raise DemixError(
                f"unknown domain {name!r}{suggest(name, openers)} (domains: {', '.join(openers)})"
            )
    declared = embedded.NOVEL_DOMAINS if "embedded" in config.sources else ()
    novel = config.novel_domains or tuple(n for n in declared if n not in config.train_domains)
    train = config.train_domains or tuple(n for n in openers if n not in novel + declared)
    sources = {}
    for name in train + novel:
        try:
            sources[name] = openers[name]()
        except DemixError as error:
            raise DemixError(f"domain {name!r}: {error}") from None
    return Domains(sources, train, novel)


@dataclasses.dataclass(frozen=True)
class Embedded:
    """A domain of the embedded corpus: one part, as later documents depend on earlier ones."""

    domain: str

    def parts(self) -> list[Part]:
        """Returns the parts of the source."""
        return [EmbeddedPart(self.domain)]

    def cheap_fingerprint(self) -> str:
        """Returns a digest that is cheap to compute."""
        return embedded.fingerprint(self.domain)

    def fingerprint(self) -> str:
        """Returns a digest of the source."""
        return embedded.fingerprint(self.domain)


@dataclasses.dataclass(frozen=True)
class EmbeddedPart:
    """All of an embedded domain."""

    domain: str
    size: int = embedded.MAX_BYTES

    def documents(self, broken: BadRecords) -> Iterator[Document]:
        """Reads the documents of the part."""
        del broken
        return iter(_read_embedded(self.domain))


@functools.lru_cache(maxsize=2)  # the tokenizer's sample and the token files read the same text
def _read_embedded(domain: str) -> tuple[Document, ...]:
    return tuple(embedded.read_domain(domain))


def split_name(place: str) -> tuple[str, str]:
    """Splits NAME=PLACE into the name and the place; the name is "" where there is none."""
    named = _NAMED.fullmatch(place)
    return (named[1], named[2]) if named else ("", place)


def is_described(place: str) -> bool:
    """Returns True for what only `data.sources` has: a name, a scheme, options, or a table."""
    name, address = split_name(place)
    address, options = _split_options(address)
    scheme = address.partition(":")[0]
    return bool(name or options or scheme in ("hf", "tfds", "seqio") or is_table(address))


def read_place(place: str) -> Iterator[Document]:
    """Reads all documents of a place as `data.sources` has them, with or without a name.

    Raises DemixError for a place that cannot be read, or a broken row.
    """
    source = _open_source(split_name(place)[1], DataConfig(dir=""))
    broken = BadRecords()
    return (document for part in source.parts() for document in part.documents(broken))


def _domains_in(place: str, config: DataConfig) -> Iterator[tuple[str, Callable[[], Source]]]:
    """Yields names of domains, each with a function that opens its source."""
    if place == "embedded":
        for name in embedded.TRAIN_DOMAINS + embedded.NOVEL_DOMAINS:
            yield name, functools.partial(Embedded, name)
    elif (named := split_name(place))[0]:
        yield named[0], functools.partial(_open_source, named[1], config)
    else:
        yield from _folder(place, config)


def _open_source(place: str, config: DataConfig) -> Source:
    """Opens the source of a domain."""
    address, options = _split_options(place)
    kind, colon, rest = address.partition(":")
    if colon and kind == "tfds":
        return TfdsSource(rest, options)
    if colon and kind == "seqio":
        return SeqioSource(rest, options)
    if colon and kind == "hf":
        return HubSource(rest, options)
    return _open_files(address, _parse_selection(address, options), config)


def _open_files(place: str, selection: Selection, config: DataConfig) -> TextFiles:
    _check_apart(place, config.dir)
    source = TextFiles(place, selection, config.part_bytes)
    source.files()
    return source


def _parse_selection(address: str, options: dict[str, list[str]]) -> Selection:
    for option in options:
        if option not in Selection._fields:
            raise DemixError(
                f"unknown option {option!r} of {address}{suggest(option, Selection._fields)} "
                "(options of files: field, where)"
            )
    return Selection(options.get("field", ["text"])[-1], parse_where(options.get("where", [])))


def _split_options(place: str) -> tuple[str, dict[str, list[str]]]:
    """Splits `address?key=value&key=value` into the address and the values of each key."""
    match = _OPTIONS.fullmatch(place)
    if not match:
        return place, {}
    options: dict[str, list[str]] = {}
    for pair in match[2].split("&"):
        key, equals, value = pair.partition("=")
        if not equals:
            raise DemixError(f"{pair!r} in {place!r} is not KEY=VALUE")
        options.setdefault(key, []).append(value)
    return match[1], options


def _folder(place: str, config: DataConfig) -> Iterator[tuple[str, Callable[[], Source]]]:
    """Yields the domains of a folder: files of JSON lines, and folders."""
    is_empty = True
    folder, options = _split_options(place)
    selection = _parse_selection(folder, options)
    entries = list_folder(folder)
    for entry, is_folder in entries:
        name = None if is_litter_folder(entry) else entry if is_folder else domain_of(entry)
        if name is None:
            check_ending(folder, entry)
            continue
        path = f"{folder.rstrip('/')}/{entry}"
        if is_folder and _compared(path) == _compared(config.dir):  # our output is no domain
            continue
        if is_folder and _compared(folder) == _compared(config.dir) and _is_prepared(path, entries):
            continue
        is_empty = False
        yield name, functools.partial(_open_files, path, selection, config)
    if is_empty:
        raise DemixError(
            f"data source {folder!r} holds no <domain>.jsonl[.gz|...] and no <domain>/ folder"
        )


def _is_prepared(path: str, entries: list[tuple[str, bool]]) -> bool:
    """Returns True if a folder in the data folder is ours, and no domain beside its own files."""
    name = path.rpartition("/")[2]
    has_source = any(domain_of(entry) == name for entry, is_folder in entries if not is_folder)
    return has_source or name == "tokenizer" or ("meta.json", False) in list_folder(path)


def _check_apart(source: str, data_dir: str) -> None:
    """Raises DemixError if the prepared data would be among the files of a source."""
    if data_dir and _compared(data_dir).startswith(_compared(source)):
        raise DemixError(
            f"the prepared data would go to {data_dir}, among the text of {source}; use another "
            "--data_dir"
        )


def _compared(place: str) -> str:
    """Returns a folder as it is compared, with a slash at its end."""
    return resolve_path(place).rstrip("/") + "/"
