"""A domain that is a SeqIO task: the examples of its preprocessors, not trimmed.

    NAME=seqio:MODULE:TASK    a task that is registered when the module is imported
    NAME=seqio:TASK           a task that is registered already, in every process that reads it

Options: `field` (the text: by default `text`, else the one `..._pretokenized` field, else the one
field of strings; a field of tokens is decoded by the task's vocabulary), `where=field:value|value`,
`train`, `valid` and `test` (the task's names of the splits) and `version` (any text: change it when
the task's code changes, which is not examined). A part is a shard of the task's source.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from demix_jax.data.sources import example_fields
from demix_jax.data.sources.base import (
    BadRecords,
    Document,
    Where,
    digest,
    matches,
    one_line,
    value_of,
)
from demix_jax.data.sources.example_fields import Query
from demix_jax.data.sources.lazy_tf import import_tensorflow, quiet_import
from demix_jax.errors import DemixError, suggest

_UNKNOWN_SIZE = 1  # bytes of a shard that is not a file


class _Address(NamedTuple):
    """A task: the module that registers it, if any, and its name."""

    module: str | None
    task: str

    @property
    def place(self) -> str:
        return ":".join(("seqio", *filter(None, self)))


class _Text(NamedTuple):
    """The field that is the text, and whether it holds tokens."""

    field: str
    is_tokens: bool


@dataclasses.dataclass(frozen=True)
class SeqioPart:
    """The examples of a task from one shard of its source; see Part.

    Attributes:
        address: module and name of the task.
        split: "train", "valid" or "test".
        stored: split of the task.
        shard: index of the shard.
        shards: number of shards of the split.
        missing: splits whose documents are among these.
        text: field of the text.
        where: conditions that the examples have to meet.
        size: bytes of the shard, or 1 if it is not a file.
    """

    address: _Address
    split: str
    stored: str
    shard: int
    shards: int
    missing: tuple[str, ...]
    text: _Text
    where: Where
    size: int

    def documents(self, broken: BadRecords) -> Iterator[Document]:
        """Reads the part; raises DemixError if the task cannot."""
        task = _find_task(self.address)
        field = self.text.field
        vocabulary = task.output_features[field].vocabulary if self.text.is_tokens else None
        names = {field, *(name for name, _ in self.where)}
        dataset = _dataset(task, self.address.place, self.stored, self.shard, self.shards)
        dataset = dataset.map(lambda example: {name: value_of(example, name) for name in names})
        for index, example in enumerate(_examples(dataset, self.address.place, self.stored)):
            if not matches(example, self.where, example_fields.as_text):
                continue
            name = f"{self.stored}/{self.shard}/{index}"
            place = f"{self.address.place}: {name}"
            text: str | None
            if vocabulary is not None:
                text = _detokenize(vocabulary, example[field].tolist(), place)
            else:
                text = example_fields.decode(example[field], place, broken)
            if text is not None:
                split = example_fields.assign_split(text, self.split, self.missing)
                yield Document(text, name, split)


class SeqioSource:
    """A domain in a SeqIO task; see Source and the module's docstring.

    The module is not imported before something is asked for. Then, methods raise DemixError for a
    module that cannot be imported, a task that is not registered, a field that is not there or not
    text, and a split that does not exist or is empty.
    """

    def __init__(self, address: str, options: Mapping[str, str | Sequence[str]]) -> None:
        """Takes an address and options as written; raises DemixError for an unknown option."""
        first, colon, rest = address.partition(":")
        self._address = _Address(first, rest) if colon else _Address(None, address)
        self._query = example_fields.parse_options(f"seqio:{address}", options, ("version",))

    def parts(self) -> list[SeqioPart]:
        """Returns the parts of the source."""
        text, where = self._selection
        parts = []
        for split, shards in self._shards.items():
            sizes = [file.size for file in self._files(shards)] or [_UNKNOWN_SIZE] * len(shards)
            self._check_not_empty(split, len(shards))
            for shard, size in enumerate(sizes):
                parts.append(
                    SeqioPart(
                        address=self._address,
                        split=split,
                        stored=self._chosen[split],
                        shard=shard,
                        shards=len(shards),
                        missing=self._missing if split == "train" else (),
                        text=text,
                        where=where,
                        size=size,
                    )
                )
        return parts

    def cheap_fingerprint(self) -> str:
        """Returns a digest of the options, and of names, sizes and times of files."""
        return digest(self._describe(with_times=True))

    def fingerprint(self) -> str:
        """Returns a digest of the options, and of names and sizes of files.

        The contents of files may be terabytes; the option `version` stands for the task's code.
        """
        return digest(self._describe(with_times=False))

    def _describe(self, with_times: bool) -> list[Any]:
        query = self._query
        shards = {}
        for split, paths in self._shards.items():
            files = self._files(paths)
            shards[split] = [file if with_times else file[:2] for file in files] or paths
        asked = [query.field, query.where, query.others.get("version")]
        return [self._address, asked, self._chosen, shards]

    @functools.cached_property
    def _task(self) -> Any:
        return _find_task(self._address)

    @functools.cached_property
    def _chosen(self) -> dict[str, str]:
        query = self._query
        try:
            names = list(self._task.splits)
        except Exception as error:  # whatever a task's source may raise
            raise DemixError(
                f"{query.place}: its splits cannot be listed ({one_line(error)})"
            ) from error
        for split, name in query.splits.items():
            if name not in names:
                raise DemixError(
                    f"{query.place}: {split}={name} is no split of the task"
                    f"{suggest(name, names)} (its splits: {example_fields.listed(names)})"
                )
        chosen = example_fields.choose_splits(query, names)
        for i, (split, name) in enumerate(chosen.items()):
            for other in list(chosen)[:i]:
                if chosen[other] == name:
                    raise DemixError(
                        f"{query.place}: {other} and {split} are both the split {name!r}; give "
                        f"the options train=, valid= and test= splits that differ "
                        f"(its splits: {example_fields.listed(names)})"
                    )
        return chosen

    @functools.cached_property
    def _missing(self) -> tuple[str, ...]:
        return example_fields.missing_splits(self._chosen)

    @functools.cached_property
    def _shards(self) -> dict[str, list[str]]:
        """Returns the names of every split's shards."""
        shards = {}
        for split, name in self._chosen.items():
            try:
                shards[split] = [str(s) for s in self._task.source.list_shards(name)]
            except Exception as error:  # whatever a task's source may raise
                raise DemixError(
                    f"{self._query.place}: split {name!r} cannot be listed ({one_line(error)})"
                ) from error
            if not shards[split]:
                self._refuse_empty(split)
        return shards

    @functools.cached_property
    def _selection(self) -> tuple[_Text, Where]:
        """Returns the field of the text and the conditions, checked against the examples."""
        query, task = self._query, self._task
        shards = len(self._shards["train"])
        spec = _dataset(task, query.place, self._chosen["train"], 0, shards).element_spec
        fields = example_fields.flatten_fields(spec, Mapping)
        kinds = {name: _kind(spec) for name, spec in fields.items()}
        text = _choose_field(query, kinds, set(task.output_features))

        def is_scalar(path: str) -> bool:
            return fields[path].shape.rank == 0

        def normalize(path: str, values: Sequence[str]) -> tuple[str, ...]:
            kind = np.dtype(fields[path].dtype.as_numpy_dtype).kind
            return example_fields.normalize_values(query, path, values, kind)

        return text, example_fields.check_where(query, kinds, is_scalar, normalize)

    def _files(self, shards: Sequence[str]) -> list[example_fields.FileStat]:
        """Returns the files of the shards, or [] if the source has no files."""
        seqio = _import_seqio()
        if not isinstance(self._task.source, seqio.FileDataSource | seqio.TfdsDataSource):
            return []
        return example_fields.stat_files(self._query.place, shards)

    def _check_not_empty(self, split: str, shards: int) -> None:
        name, place = self._chosen[split], self._query.place
        for shard in range(shards):
            dataset = _dataset(self._task, place, name, shard, shards)
            if any(True for _ in _examples(dataset.take(1), place, name)):
                return
        self._refuse_empty(split)

    def _refuse_empty(self, split: str) -> None:
        raise DemixError(
            f"{self._query.place}: {split}={self._chosen[split]} is empty "
            f"(the task's splits: {example_fields.listed(self._task.splits)})"
        )


def _import_seqio() -> Any:
    with quiet_import("SeqIO"):
        import seqio
    return seqio


def _find_task(address: _Address) -> Any:
    """Returns the registered task, after its module is imported."""
    seqio = _import_seqio()
    whole = ":".join(filter(None, address))
    if whole in seqio.TaskRegistry.names():  # a task whose name has a colon
        return seqio.TaskRegistry.get(whole)
    if address.module:
        example_fields.import_named(address.place, address.module)
    names = list(seqio.TaskRegistry.names())
    if address.task in names:
        return seqio.TaskRegistry.get(address.task)
    if address.task in seqio.MixtureRegistry.names():
        raise DemixError(f"{address.place} is a mixture; name one task of it for each domain")
    hint = "" if address.module else "; name the module that registers it: seqio:MODULE:TASK"
    raise DemixError(
        f"{address.place}: no task {address.task!r} is registered{suggest(address.task, names)}"
        f"{hint} (registered: {example_fields.listed(sorted(names))})"
    )


def _dataset(task: Any, place: str, split: str, shard: int, shards: int) -> Any:
    """Returns a tf.data.Dataset of one shard's examples, always in the same order."""
    seqio = _import_seqio()
    tf = import_tensorflow()
    tf.random.set_seed(shard)  # for preprocessors; not every source takes a seed of its own
    try:
        return task.get_dataset(
            sequence_length=None,
            split=split,
            shuffle=False,
            shard_info=seqio.ShardInfo(shard, shards),
            try_in_mem_cache=False,
        )
    except Exception as error:  # whatever a task's code may raise
        raise DemixError(
            f"{place}: split {split!r} cannot be opened ({one_line(error)})"
        ) from error


def _examples(dataset: Any, place: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        yield from dataset.as_numpy_iterator()
    except Exception as error:  # whatever a task's code may raise
        raise DemixError(f"{place}: split {split!r} cannot be read ({one_line(error)})") from error


def _kind(spec: Any) -> str:
    """Returns a tensor's type in words: "string", "int32[]"."""
    sizes = spec.shape if spec.shape.rank is not None else []
    return spec.dtype.name + "".join(f"[{'' if size is None else size}]" for size in sizes)


def _choose_field(query: Query, kinds: Mapping[str, str], outputs: set[str]) -> _Text:
    """Returns the field that is the text: as asked, or the only one that can be."""
    strings = [name for name, kind in kinds.items() if kind == "string"]
    asked = query.field
    if asked is not None:
        for name in (asked, f"{asked}_pretokenized"):
            if name in strings:
                return _Text(name, is_tokens=False)
        example_fields.check_field(query, asked, kinds)
        if asked in outputs and kinds[asked] in ("int32[]", "int64[]"):
            return _Text(asked, is_tokens=True)
        raise DemixError(
            f"{query.place}: field {asked!r} is {kinds[asked]}, neither text nor tokens of one of "
            f"the task's output features ({example_fields.describe_fields(kinds)})"
        )
    pretokenized = [name for name in strings if name.endswith("_pretokenized")]
    for names in ([name for name in strings if name == "text"], pretokenized, strings):
        if len(names) == 1:
            return _Text(names[0], is_tokens=False)
        if names:
            break
    raise DemixError(
        f"{query.place} has {'several fields' if strings else 'no field'} of text; "
        f"say which with the option field= ({example_fields.describe_fields(kinds)})"
    )


def _detokenize(vocabulary: Any, tokens: list[int], place: str) -> str:
    text = vocabulary.decode(tokens)
    if not isinstance(text, str):
        raise DemixError(
            f"{place}: vocabulary {type(vocabulary).__name__} does not turn tokens into text; "
            "name another field with the option field="
        )
    return text
