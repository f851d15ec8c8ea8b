"""A domain that is a SeqIO task: what its preprocessors yield, before any token is cut.

    NAME=seqio:MODULE:TASK    a task that is registered when the module is imported
    NAME=seqio:TASK           a task that is registered already, in every process that reads it

Options: `field` (the text: by default `text`, else the one `..._pretokenized` field, else the one
field of strings; a field of tokens is decoded by the task's vocabulary), `where=field:value|value`,
`train`, `valid` and `test` (the task's names of the splits) and `version` (any text: change it when
the task's code changes, which is not looked into). A part is a shard of the task's source.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from demix_jax.data.sources import example_fields
from demix_jax.data.sources.base import BadRecords, Document, digest
from demix_jax.data.sources.example_fields import Query, Where
from demix_jax.data.sources.lazy_tf import import_tensorflow, importing
from demix_jax.errors import DemixError, suggest

_UNKNOWN_SIZE = 1  # of a shard that is not a file


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
    """What a task makes of one shard of its source; see Part.

    Attributes:
        address: The task.
        split: Ours: "train", "valid" or "test".
        stored: The task's own.
        shard: Which shard.
        shards: Of how many.
        missing: Splits whose documents are among these.
        text: The field of the text.
        where: What else the examples must have.
        size: Bytes of the shard, or 1 where it is not a file.
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
        """Reads the part; raises DemixError for what the task cannot read."""
        task = _find_task(self.address)
        field = self.text.field
        vocabulary = task.output_features[field].vocabulary if self.text.is_tokens else None
        names = {field, *(name for name, _ in self.where)}
        dataset = _dataset(task, self.address.place, self.stored, self.shard, self.shards)
        dataset = dataset.map(lambda example: {name: _at(example, name) for name in names})
        for index, example in enumerate(_rows(dataset, self.address.place, self.stored)):
            if not example_fields.wanted(example, self.where):
                continue
            name = f"{self.stored}/{self.shard}/{index}"
            place = f"{self.address.place}: {name}"
            text: str | None
            if vocabulary is not None:
                text = _detokenize(vocabulary, example[field].tolist(), place)
            else:
                text = example_fields.decode(example[field], place, broken)
            if text is not None:
                yield Document(
                    text, name, example_fields.place_text(text, self.split, self.missing)
                )


class SeqioSource:
    """A domain in a SeqIO task; see Source and the module's docstring.

    The module is not imported before something is asked for. Then, a DemixError says what is wrong:
    a module that cannot be imported, a task that is not registered, a field that is not there or
    not text, a split that does not exist or is empty.
    """

    def __init__(self, address: str, options: Mapping[str, str | Sequence[str]]) -> None:
        """Takes `address` and `options` as written; raises DemixError for an unknown option."""
        first, colon, rest = address.partition(":")
        self._address = _Address(first, rest) if colon else _Address(None, address)
        self._query = example_fields.parse_options(f"seqio:{address}", options, ("version",))

    def parts(self) -> list[SeqioPart]:
        """See Source."""
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

    def stamp(self) -> str:
        """See Source: what the fingerprint is made of, and when the files were written."""
        return digest(self._facts(with_times=True))

    def fingerprint(self) -> str:
        """See Source: of names and sizes. The option `version` stands for what the task's code is.

        Nor are the contents of files looked into, which may be terabytes.
        """
        return digest(self._facts(with_times=False))

    def _facts(self, with_times: bool) -> list[Any]:
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
            found = list(self._task.splits)
        except Exception as error:  # whatever a task's source may raise
            raise DemixError(
                f"{query.place}: its splits cannot be listed ({example_fields.one_line(error)})"
            ) from error
        for split, name in query.splits.items():
            if name not in found:
                raise DemixError(
                    f"{query.place}: {split}={name} is no split of the task"
                    f"{suggest(name, found)} (its splits: {example_fields.listed(found)})"
                )
        chosen = example_fields.choose_splits(query, found)
        for i, (split, name) in enumerate(chosen.items()):
            for other in list(chosen)[:i]:
                if chosen[other] == name:
                    raise DemixError(
                        f"{query.place}: {other} and {split} are both the split {name!r}; give "
                        f"the options train=, valid= and test= splits that differ "
                        f"(its splits: {example_fields.listed(found)})"
                    )
        return chosen

    @functools.cached_property
    def _missing(self) -> tuple[str, ...]:
        return example_fields.missing_splits(self._chosen)

    @functools.cached_property
    def _shards(self) -> dict[str, list[str]]:
        """The names of every split's shards."""
        found = {}
        for split, name in self._chosen.items():
            try:
                found[split] = [str(s) for s in self._task.source.list_shards(name)]
            except Exception as error:  # whatever a task's source may raise
                raise DemixError(
                    f"{self._query.place}: split {name!r} cannot be listed "
                    f"({example_fields.one_line(error)})"
                ) from error
            if not found[split]:
                self._refuse_empty(split)
        return found

    @functools.cached_property
    def _selection(self) -> tuple[_Text, Where]:
        """The field of the text and the conditions, both checked against the task's examples."""
        query, task = self._query, self._task
        shards = len(self._shards["train"])
        spec = _dataset(task, query.place, self._chosen["train"], 0, shards).element_spec
        fields = _flatten(spec)
        kinds = {name: _kind(spec) for name, spec in fields.items()}
        text = _choose_field(query, kinds, set(task.output_features))
        where = []
        for path, values in query.where:
            example_fields.check_field(query, path, kinds)
            if fields[path].shape.rank != 0:
                raise DemixError(
                    f"{query.place}: where= compares single values, and field {path!r} is "
                    f"{kinds[path]} ({example_fields.show(kinds)})"
                )
            kind = np.dtype(fields[path].dtype.as_numpy_dtype).kind
            where.append((path, example_fields.comparable(query, path, values, kind)))
        return text, tuple(where)

    def _files(self, shards: Sequence[str]) -> list[example_fields.File]:
        """The files that the shards are, or [] if the source has none."""
        seqio = _import_seqio()
        if not isinstance(self._task.source, seqio.FileDataSource | seqio.TfdsDataSource):
            return []
        return example_fields.look_at(self._query.place, shards)

    def _check_not_empty(self, split: str, shards: int) -> None:
        name, place = self._chosen[split], self._query.place
        for shard in range(shards):
            for _ in _rows(_dataset(self._task, place, name, shard, shards).take(1), place, name):
                return
        self._refuse_empty(split)

    def _refuse_empty(self, split: str) -> None:
        raise DemixError(
            f"{self._query.place}: {split}={self._chosen[split]} is empty "
            f"(the task's splits: {example_fields.listed(self._task.splits)})"
        )


def _import_seqio() -> Any:
    with importing("SeqIO"):
        import seqio
    return seqio


def _find_task(address: _Address) -> Any:
    """The registered task, after its module is imported."""
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
    """The examples of one shard, always the same ones in the same order, as a tf.data.Dataset."""
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
            f"{place}: split {split!r} cannot be opened ({example_fields.one_line(error)})"
        ) from error


def _rows(dataset: Any, place: str, split: str) -> Iterator[dict[str, Any]]:
    try:
        yield from dataset.as_numpy_iterator()
    except Exception as error:  # whatever a task's code may raise
        raise DemixError(
            f"{place}: split {split!r} cannot be read ({example_fields.one_line(error)})"
        ) from error


def _at(example: Mapping[str, Any], path: str) -> Any:
    """The field at a path; a name may itself have slashes."""
    if path in example:
        return example[path]
    first, _, rest = path.partition("/")
    return _at(example[first], rest)


def _flatten(spec: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every tensor's specification by its path."""
    found: dict[str, Any] = {}
    for name, value in spec.items():
        if isinstance(value, Mapping):
            found |= _flatten(value, f"{prefix}{name}/")
        else:
            found[prefix + name] = value
    return found


def _kind(spec: Any) -> str:
    """A tensor's type in words: "string", "int32[]"."""
    sizes = spec.shape if spec.shape.rank is not None else []
    return spec.dtype.name + "".join(f"[{'' if size is None else size}]" for size in sizes)


def _choose_field(query: Query, kinds: Mapping[str, str], outputs: set[str]) -> _Text:
    """Where the text is: as the user says, or if there is one place it can be."""
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
            f"the task's output features ({example_fields.show(kinds)})"
        )
    pretokenized = [name for name in strings if name.endswith("_pretokenized")]
    for names in ([name for name in strings if name == "text"], pretokenized, strings):
        if len(names) == 1:
            return _Text(names[0], is_tokens=False)
        if names:
            break
    raise DemixError(
        f"{query.place} has {'several fields' if strings else 'no field'} of text; "
        f"say which with the option field= ({example_fields.show(kinds)})"
    )


def _detokenize(vocabulary: Any, tokens: list[int], place: str) -> str:
    text = vocabulary.decode(tokens)
    if not isinstance(text, str):
        raise DemixError(
            f"{place}: vocabulary {type(vocabulary).__name__} does not turn tokens into text; "
            "name another field with the option field="
        )
    return text
