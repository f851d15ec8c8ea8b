"""A domain that is a Hugging Face dataset, streamed through the `datasets` library.

    NAME=hf:DATASET[:CONFIG]     a dataset of the Hub, at the commit that its main branch has now
    NAME=hf:FOLDER[:CONFIG]      a folder: of files of rows, or one that `save_to_disk` made

Options: `field` (the text, by default `text`; `a/b` for field b of a), `where=field:value|value`,
`train`, `valid` and `test` (names of the dataset's splits). A part is a shard of a split.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from demix_jax.data.sources import example_fields
from demix_jax.data.sources.base import (
    BadRecords,
    Document,
    Selection,
    digest,
    make_document,
    one_line,
)
from demix_jax.data.sources.listing import find_files, hash_contents
from demix_jax.errors import DemixError
from demix_jax.files import resolve_path

_SAVED = ("dataset_dict.json", "state.json")  # in a folder that `save_to_disk` made


@dataclasses.dataclass(frozen=True)
class HubDataset:
    """The place of a dataset.

    Attributes:
      name: name on the Hub, or a folder.
      config: name of the configuration; "" means the only one.
      revision: commit on the Hub; "" for a folder.
    """

    name: str
    config: str = ""
    revision: str = ""

    def open(self) -> dict[str, Any]:
        """Returns the streams of the splits by name; raises DemixError if it cannot be opened."""
        datasets = _import_datasets()
        with _readable(self.name):
            if any((Path(self.name) / name).is_file() for name in _SAVED):
                found = datasets.load_from_disk(self.name)
                splits = found if isinstance(found, dict) else {"train": found}
                return {
                    name: each.to_iterable_dataset(num_shards=_shards(each))
                    for name, each in splits.items()
                }
            return dict(
                datasets.load_dataset(
                    self.name,
                    self.config or None,
                    revision=self.revision or None,
                    streaming=True,
                )
            )


@dataclasses.dataclass(frozen=True)
class HubPart:
    """A shard of a split.

    Attributes:
      dataset: the dataset.
      stored: name of the split in the dataset.
      split: split that its documents are of: train, valid or test.
      missing: splits whose documents are among these.
      shard: number of the shard.
      selection: field of the text, and conditions.
      size: about how many bytes there are to read; 1 where the dataset does not say.
    """

    dataset: HubDataset
    stored: str
    split: str
    missing: tuple[str, ...]
    shard: int
    selection: Selection
    size: int

    def documents(self, broken: BadRecords) -> Iterator[Document]:
        """Reads the documents of the part."""
        stream = self.dataset.open()[self.stored]
        with _readable(self.dataset.name):
            rows = stream.shard(stream.num_shards, self.shard) if stream.num_shards > 1 else stream
            for i, row in enumerate(rows):
                place = f"{self.stored}/{self.shard}/{i}"
                row = {name: value for name, value in row.items() if name != "split"}
                try:
                    document = make_document(row, place, self.selection)
                except DemixError as error:
                    broken.skip(f"{self.dataset.name}: {place}: {error}")
                else:
                    if document:
                        split = example_fields.assign_split(document.text, self.split, self.missing)
                        yield document._replace(split=split)


class HubSource:
    """A domain in a Hugging Face dataset; see Source and the module's docstring.

    Nothing is opened before it is asked for. Then, methods raise DemixError for a dataset or config
    that does not exist, a field that is not there and a split that does not exist.
    """

    def __init__(self, address: str, options: Mapping[str, str | Sequence[str]]) -> None:
        """Takes an address and options as written; raises DemixError for an unknown option."""
        self._query = example_fields.parse_options(f"hf:{address}", options, ())
        self._selection = Selection(self._query.field or "text", self._query.where)
        name, colon, config = address.rpartition(":")
        name, config = (name, config) if colon and not os.path.isdir(address) else (address, "")
        folder = resolve_path(name)
        self._is_local = os.path.isdir(folder)
        if not name or (name.startswith(("/", ".", "~")) and not self._is_local):
            raise DemixError(f"hf:{address}: there is no folder {name!r}")
        self._name, self._config = (folder if self._is_local else name), config

    def parts(self) -> list[HubPart]:
        """Returns the parts of the source."""
        streams = self._streams
        chosen = self._chosen
        missing = example_fields.missing_splits(chosen)
        parts = []
        for split, stored in chosen.items():
            stream = streams[stored]
            size = _bytes(stream, stored) // stream.num_shards
            parts += [
                HubPart(
                    self._dataset,
                    stored,
                    split,
                    missing if split == "train" else (),
                    shard,
                    self._selection,
                    max(1, size),
                )
                for shard in range(stream.num_shards)
            ]
        return parts

    def cheap_fingerprint(self) -> str:
        """Returns a digest of the commit, or of names, sizes and times of a folder's files."""
        files = [tuple(file)[1:] for file in find_files(self._name)] if self._is_local else []
        return digest(self._describe(), files)

    def fingerprint(self) -> str:
        """Returns a digest of the commit, or of the contents of a folder's files."""
        contents = hash_contents(self._name, find_files(self._name)) if self._is_local else []
        return digest(self._describe(), contents)

    def _describe(self) -> list[Any]:
        name = "" if self._is_local else self._name
        return [name, self._config, self._dataset.revision, self._selection, self._query.splits]

    @functools.cached_property
    def _dataset(self) -> HubDataset:
        revision = "" if self._is_local else _commit(self._name)
        return HubDataset(self._name, self._config, revision)

    @functools.cached_property
    def _streams(self) -> dict[str, Any]:
        return self._dataset.open()

    @functools.cached_property
    def _chosen(self) -> dict[str, str]:
        """Returns the dataset's split for each of ours, after checking splits and the field."""
        streams = self._streams
        chosen = example_fields.choose_splits(self._query, list(streams))
        for split, stored in chosen.items():
            if stored not in streams:
                raise DemixError(
                    f"{self._query.place}: {split}={stored} is no split of the dataset (its "
                    f"splits: {', '.join(streams)})"
                )
            features = streams[stored].features
            column = self._selection.field.partition("/")[0]
            if features and not {column, self._selection.field} & set(features):
                raise DemixError(
                    f"{self._query.place} has no field {column!r} in {stored!r}; name the text by "
                    f"?field= (its fields: {', '.join(features)})"
                )
        return chosen


def _shards(stored: Any) -> int:
    """Returns the number of shards of a dataset on disk: its files, and one row at least each."""
    return max(1, min(len(stored.cache_files) or 1, stored.num_rows))


def _bytes(stream: Any, stored: str) -> int:
    """Returns the bytes of a split, or 0 where the dataset does not say."""
    splits = getattr(stream.info, "splits", None) or {}
    return int(getattr(splits.get(stored), "num_bytes", 0) or 0)


def _commit(name: str) -> str:
    """Returns the commit that a dataset's main branch has now."""
    _import_datasets()
    import huggingface_hub

    with _readable(name):
        return str(huggingface_hub.HfApi().dataset_info(name).sha)


@functools.cache
def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DemixError(
            f"Hugging Face datasets need the library datasets, which cannot be imported ({error}); "
            "install it with: pip install 'demix_jax[datasets]'"
        ) from None
    datasets.disable_progress_bars()
    return datasets


@contextlib.contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turns errors of the library into a DemixError of one line."""
    try:
        yield
    except DemixError:
        raise
    except Exception as error:  # of files, of the network, and of its own
        raise DemixError(
            f"hf:{name} cannot be read: {one_line(error)}; is it a dataset of the Hub, or a folder?"
        ) from None
