"""A domain that is a TensorFlow dataset (TFDS), read from the files TFDS has prepared.

    NAME=tfds:DATASET[/CONFIG][:VERSION]    a dataset of TFDS's catalogue or of a module of yours
    NAME=tfds:FOLDER                        a prepared dataset: the folder of dataset_info.json

Options: `field` (the text, by default `text`; `a/b` for field b of a), `where=field:value|value`,
`train`, `valid` and `test` (TFDS's split expressions, as `train[:90%]`), `data_dir` (where TFDS
keeps its datasets) and `import` (the module that defines the dataset). A dataset that is not
prepared yet is prepared first, as `tfds build` does. A part is a split's examples in one file.
ArrayRecord files are read without TensorFlow, TFRecord files through it.
"""

import contextlib
import dataclasses
import functools
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from demix_jax.data.sources import example_fields
from demix_jax.data.sources.base import BadRecords, Document, Selection, digest, matches, one_line
from demix_jax.data.sources.example_fields import Query
from demix_jax.data.sources.lazy_tf import import_tensorflow, quiet_import, quiet_stderr
from demix_jax.errors import DemixError, suggest
from demix_jax.files import resolve_path

_OPTIONS = ("data_dir", "import")
_INFO = "dataset_info.json"
_AT_ONCE = 16  # records per read: one by one takes three times as long
_BUFFER_BYTES = 1 << 20


class _Span(NamedTuple):
    """Examples `start` to `stop` of a split of the dataset, all in one file.

    Attributes:
        split: "train", "valid" or "test".
        stored: split of the dataset.
        start: index in the stored split of the first example.
        stop: index after the last example.
        file: path of the file.
        share: fraction of the file's examples.
    """

    split: str
    stored: str
    start: int
    stop: int
    file: str
    share: float


@dataclasses.dataclass(frozen=True)
class TfdsPart:
    """The examples of a split in one file; see Part.

    Attributes:
        folder: folder of the prepared dataset.
        span: range of the examples.
        missing: splits whose documents are among these.
        selection: field of the text, and conditions.
        size: approximate number of bytes.
    """

    folder: str
    span: _Span
    missing: tuple[str, ...]
    selection: Selection
    size: int

    def documents(self, broken: BadRecords) -> Iterator[Document]:
        """Reads the part; raises DemixError if its file is damaged or not the dataset's."""
        tfds = _import_tfds()
        builder = _open_folder(tfds, self.folder)
        fields = _flatten(tfds, builder.info.features)
        field, where = self.selection
        names = {field, *(name for name, _ in where)}
        parser = tfds.features.FeaturesDict({name: fields[name] for name in sorted(names)})
        index = self.span.start
        for example in self._parse(tfds, builder, parser):
            name = f"{self.span.stored}/{index}"
            index += 1
            if not matches(example, where, example_fields.as_text):
                continue
            text = example_fields.decode(example[field], f"{self.folder}: {name}", broken)
            if text is not None:
                split = example_fields.assign_split(text, self.span.split, self.missing)
                yield Document(text, name, split)
        if index != self.span.stop:
            raise DemixError(
                f"{self.span.file} ends at example {index} of {self.span.stored!r}, and "
                f"{self.folder}/{_INFO} says at {self.span.stop}; prepare the dataset again"
            )

    def _parse(self, tfds: Any, builder: Any, parser: Any) -> Iterator[dict[str, Any]]:
        """Yields the examples, of which a few are in memory at a time."""
        in_array_record = builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD
        read = self._array_records if in_array_record else self._tf_records
        try:
            for record in read(tfds, builder):
                yield parser.deserialize_example_np(record)
        except DemixError:
            raise
        except Exception as error:  # each format's reader raises errors of its own
            raise DemixError(
                f"{self.span.file} cannot be read ({one_line(error)}); prepare the dataset again"
            ) from error

    def _array_records(self, tfds: Any, builder: Any) -> Iterator[bytes]:
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        source = builder.as_data_source(_slice(tfds, self.span), deserialize_method=raw)
        for first in range(0, len(source), _AT_ONCE):
            yield from source.__getitems__(range(first, min(first + _AT_ONCE, len(source))))

    def _tf_records(self, tfds: Any, builder: Any) -> Iterator[bytes]:
        tf = import_tensorflow()
        (file,) = builder.info.splits[_slice(tfds, self.span)].file_instructions
        records = tf.data.TFRecordDataset(file.filename, buffer_size=_BUFFER_BYTES)
        batches = records.skip(file.skip).take(file.take).batch(_AT_ONCE)
        for batch in batches.as_numpy_iterator():
            yield from batch


class TfdsSource:
    """A domain in a TFDS dataset; see Source and the module's docstring.

    Nothing is opened before it is asked for. Then, methods raise DemixError for a dataset, config
    or version that does not exist, a field that is not there or not text, a split that does not
    exist or is empty, and a dataset that cannot be prepared.
    """

    def __init__(self, address: str, options: Mapping[str, str | Sequence[str]]) -> None:
        """Takes an address and options as written; raises DemixError for an unknown option."""
        self._address = address
        self._query = example_fields.parse_options(f"tfds:{address}", options, _OPTIONS)

    def parts(self) -> list[TfdsPart]:
        """Returns the parts of the source."""
        files = example_fields.stat_files(self._query.place, [span.file for span in self._spans])
        return [
            TfdsPart(
                folder=str(self._builder.data_dir),
                span=span,
                missing=self._missing if span.split == "train" else (),
                selection=self._selection,
                size=round(file.size * span.share),
            )
            for span, file in zip(self._spans, files, strict=True)
        ]

    def cheap_fingerprint(self) -> str:
        """Returns a digest of versions, and of names, sizes and times of files."""
        return digest(self._describe(with_times=True))

    def fingerprint(self) -> str:
        """Returns a digest of versions, and of names and sizes of files.

        TFDS promises that a version never changes. One that was prepared again from other data has
        files of other sizes.
        """
        return digest(self._describe(with_times=False))

    def _describe(self, with_times: bool) -> list[Any]:
        info = self._builder.info
        stored = sorted({span.stored for span in self._spans})
        splits = [
            (name, list(info.splits[name].shard_lengths), int(info.splits[name].num_bytes))
            for name in stored
        ]
        files = example_fields.stat_files(self._query.place, [span.file for span in self._spans])
        parts = [
            (*span[:4], file.name, file.size, file.mtime if with_times else None)
            for span, file in zip(self._spans, files, strict=True)
        ]
        return [info.full_name, self._selection, self._missing, splits, parts]

    @functools.cached_property
    def _builder(self) -> Any:
        """Returns the prepared dataset, opened by its folder as any process can."""
        tfds, query = _import_tfds(), self._query
        if "import" in query.others:
            example_fields.import_named(query.place, query.others["import"])
        if _is_folder(self._address):
            folder = _find_folder(query, self._address)
        else:
            folder = _find_named(tfds, query, self._address)
        builder = _open_folder(tfds, resolve_path(folder))
        formats = (tfds.core.FileFormat.ARRAY_RECORD, tfds.core.FileFormat.TFRECORD)
        if builder.info.file_format not in formats:
            raise DemixError(
                f"{query.place} has files in format {builder.info.file_format.value}; "
                "convert them to array_record with: tfds convert_format"
            )
        return builder

    @functools.cached_property
    def _selection(self) -> Selection:
        """Returns the field of the text and the conditions, checked against the dataset."""
        query, tfds = self._query, _import_tfds()
        fields = _flatten(tfds, self._builder.info.features)
        kinds = {name: _kind(tfds, field) for name, field in fields.items()}
        name = query.field or "text"
        example_fields.check_field(query, name, kinds)

        def is_scalar(path: str) -> bool:
            return isinstance(fields[path], tfds.features.Tensor) and fields[path].shape == ()

        if not (is_scalar(name) and np.dtype(fields[name].np_dtype).kind == "O"):
            raise DemixError(
                f"{query.place}: field {name!r} is {kinds[name]}, not text; name another with "
                f"the option field= ({example_fields.describe_fields(kinds)})"
            )
        normalize = functools.partial(_normalize, tfds, query, fields)
        return Selection(name, example_fields.check_where(query, kinds, is_scalar, normalize))

    @functools.cached_property
    def _chosen(self) -> dict[str, str]:
        return example_fields.choose_splits(self._query, list(self._builder.info.splits))

    @functools.cached_property
    def _missing(self) -> tuple[str, ...]:
        return example_fields.missing_splits(self._chosen)

    @functools.cached_property
    def _spans(self) -> list[_Span]:
        """Returns the range of every part's examples: split by split, file by file."""
        spans = list[_Span]()
        for split, expression in self._chosen.items():
            spans += _list_spans(_import_tfds(), self._builder, self._query, split, expression)
        _check_overlaps(self._query, spans, self._chosen)
        return spans


def _import_tfds() -> Any:
    with quiet_import("TensorFlow Datasets"):
        import tensorflow_datasets as tfds  # type: ignore[import-untyped]
    return tfds


def _open_folder(tfds: Any, folder: str) -> Any:
    try:
        return tfds.builder_from_directory(folder)
    except Exception as error:
        raise DemixError(
            f"{folder} is no dataset that TFDS can open ({one_line(error)}); "
            "prepare it again with: tfds build"
        ) from error


def _is_folder(address: str) -> bool:
    looks_so = address.startswith(("/", ".", "~")) or "://" in address
    return looks_so or os.path.exists(os.path.join(address, _INFO))


def _find_folder(query: Query, address: str) -> str:
    """Finds the folder of a prepared dataset that is named by its path."""
    from etils import epath  # type: ignore[import-untyped]

    if "data_dir" in query.others:
        raise DemixError(f"{query.place} is a folder already; leave out the option data_dir")
    folder = epath.Path(resolve_path(address))
    if not (folder / _INFO).exists():
        inside = [
            p.parent for depth in ("*", "*/*", "*/*/*") for p in folder.glob(f"{depth}/{_INFO}")
        ]
        raise DemixError(
            f"{query.place}: there is no {_INFO} in this folder; name the folder of one version "
            f"(found: {example_fields.listed(sorted(map(str, inside)))})"
        )
    return str(folder)


def _find_named(tfds: Any, query: Query, address: str) -> str:
    """Finds the folder of a dataset that is named by its name; prepares it if need be."""
    data_dir = resolve_path(query.others.get("data_dir", ""))
    try:
        with quiet_stderr():  # loads the modules of many datasets
            builder = tfds.builder(address, **({"data_dir": data_dir} if data_dir else {}))
    except Exception as error:
        reason = _explain(tfds, address, data_dir) or one_line(error)
        raise DemixError(f"{query.place}: {reason}") from error
    with quiet_stderr():
        is_prepared = builder.is_prepared()
    if not is_prepared:
        _prepare(builder, query)
    return str(builder.data_dir)


def _prepare(builder: Any, query: Query) -> None:
    root = builder.data_dir_root
    print(f"{query.place} is not in {root} yet: TFDS downloads and prepares it", flush=True)
    import_tensorflow()  # silently; preparing would load it
    try:
        builder.download_and_prepare()
    except Exception as error:
        name = builder.get_reference().tfds_name(include_version=True)
        module = query.others.get("import")
        imports = f" --imports={module}" if module else ""
        raise DemixError(
            f"{query.place} could not be prepared ({one_line(error)}); "
            f"do it with: tfds build {name} --data_dir={root}{imports}"
        ) from error


def _explain(tfds: Any, address: str, data_dir: str | None) -> str | None:
    """Returns a message that names the name, config or version that does not exist, if any."""
    from etils import epath

    try:
        parsed, asked = tfds.core.naming.parse_builder_name_kwargs(address)
    except ValueError:
        return "is not of the form NAME[/CONFIG][:X.Y.Z]"
    name, config, version = str(parsed), asked.get("config"), asked.get("version")
    root = epath.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()
    try:
        code = tfds.builder_cls(name)
    except tfds.core.DatasetNotFoundError:
        code = None
    except Exception:  # it exists and cannot be loaded
        return None
    if code is None and not (root / name).exists():
        prepared = {path.name for path in root.iterdir()} if root.exists() else set()
        known = prepared.union(tfds.list_builders(with_community_datasets=False))
        return (
            f"TFDS has no dataset {name!r}{suggest(name, known)} (name the module of one "
            "of your own with the option import=, or the folder of a prepared one)"
        )
    configs = {key.partition(":")[0] for key in code.builder_configs} if code else set()
    configs |= {path.parent.parent.name for path in (root / name).glob(f"*/*/{_INFO}")}
    if config and config not in configs:
        return (
            f"dataset {name!r} has no config {config!r}{suggest(config, configs)} "
            f"(its configs: {example_fields.listed(sorted(configs))})"
        )
    versions = _versions(tfds, f"{name}/{config}" if config else name, root)
    if version and versions:
        return f"there is no version {version} (known: {example_fields.listed(versions)})"
    return None


def _versions(tfds: Any, name: str, root: Any) -> list[str]:
    """Returns the versions of a dataset that TFDS can prepare or finds prepared."""
    versions = {path.parent.name for path in (root / name).glob(f"*/{_INFO}")}
    with contextlib.suppress(Exception):  # then only the prepared ones are known
        versions.update(map(str, tfds.builder(name, data_dir=root).versions))
    return sorted(versions)


def _flatten(tfds: Any, features: Any) -> dict[str, Any]:
    """Returns every feature by its path; those inside a sequence belong to the sequence."""
    return example_fields.flatten_fields(features, tfds.features.FeaturesDict)


def _kind(tfds: Any, feature: Any) -> str:
    """Returns a feature's type in words: "string", "int64 ClassLabel", "Sequence"."""
    if not isinstance(feature, tfds.features.Tensor):
        return type(feature).__name__
    dtype = np.dtype(feature.np_dtype)
    name = "string" if dtype.kind == "O" else dtype.name
    shape = "".join(f"[{'' if size is None else size}]" for size in feature.shape)
    label = " ClassLabel" if isinstance(feature, tfds.features.ClassLabel) else ""
    return f"{name}{shape}{label}"


def _normalize(
    tfds: Any, query: Query, fields: Mapping[str, Any], path: str, values: Sequence[str]
) -> tuple[str, ...]:
    """Returns the values of a condition as the files have them: numbers for labels."""
    feature = fields[path]
    if not isinstance(feature, tfds.features.ClassLabel):
        kind = np.dtype(feature.np_dtype).kind
        return example_fields.normalize_values(query, path, values, kind)
    numbers = {str(number): number for number in range(-1, feature.num_classes or 0)}
    labels = {name: number for number, name in enumerate(feature.names or ())}
    for value in values:
        if value not in labels and value not in numbers:
            raise DemixError(
                f"{query.place}: label {path!r} is never {value!r}{suggest(value, labels)} "
                f"(its values: {example_fields.listed(labels or numbers)})"
            )
    return tuple(str(labels.get(value, numbers.get(value))) for value in values)


def _slice(tfds: Any, span: _Span) -> Any:
    return tfds.core.ReadInstruction(span.stored, from_=span.start, to=span.stop, unit="abs")


def _list_spans(tfds: Any, builder: Any, query: Query, split: str, expression: str) -> list[_Span]:
    """Returns the examples of one of TFDS's split expressions, a span for each file."""
    splits = builder.info.splits
    sizes = example_fields.listed(
        f"{name} with {info.num_examples}" for name, info in splits.items()
    )
    try:
        ranges = tfds.core.ReadInstruction.from_spec(expression).to_absolute(splits)
    except Exception as error:
        name = expression.partition("[")[0]
        raise DemixError(
            f"{query.place}: {split}={expression} is no split of the dataset"
            f"{'' if name in splits else suggest(name, splits)} "
            f"({one_line(error)}; its splits: {sizes} examples)"
        ) from error
    spans = []
    for instruction in ranges:
        stored, start, stop = instruction.splitname, instruction.from_ or 0, instruction.to
        stop = splits[stored].num_examples if stop is None else stop
        if start >= stop:
            continue
        whole = tfds.core.ReadInstruction(stored, from_=start, to=stop, unit="abs")
        for file in splits[whole].file_instructions:
            share = file.take / file.examples_in_shard
            stop = start + file.take
            spans.append(_Span(split, stored, start, stop, str(file.filename), share))
            start = stop
    if not spans:
        raise DemixError(
            f"{query.place}: {split}={expression} is empty (its splits: {sizes} examples)"
        )
    return spans


def _check_overlaps(query: Query, spans: Sequence[_Span], chosen: Mapping[str, str]) -> None:
    ordered = sorted(spans, key=operator.attrgetter("stored", "start"))

    for one, other in zip(ordered, ordered[1:], strict=False):
        if one.stored == other.stored and other.start < one.stop:
            first, second = (f"{s}={chosen[s]}" for s in (one.split, other.split))
            raise DemixError(
                f"{query.place}: {first} and {second} both have example "
                f"{one.stored}/{other.start}; give the options train=, valid= and test= "
                "splits that do not overlap"
            )
