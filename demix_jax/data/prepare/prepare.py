"""`demix prepare`: text to token files, once; everything later reads only these.

    <data_dir>/data.json                 training and novel domains, in order
    <data_dir>/tokenizer/                their tokenizer
    <data_dir>/<domain>/meta.json        counts and fingerprints: `Meta`
    <data_dir>/<domain>/<build>/         see `data/token_files.py`; one of each for every part
        train-00007.tokens  train-00007.index  valid-...  test-...  00007.json
    <data_dir>/.lock                     held by the process that prepares

A build is named by a hash of all that determines its content. Its parts are made in any order by
any number of workers; `meta.json` is written when all are there, and the older build deleted after
that. An interrupted command is repeated and goes on with the parts that are missing. With
duplicates left out, a build also has `00007.drop.npy`, by which a lost part can be made again.
"""

import functools
import hashlib
import itertools
import json
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from demix_jax.config.schema import Config
from demix_jax.data import dataset
from demix_jax.data.prepare.dedup import SplitCounts, common_documents, find_duplicates
from demix_jax.data.prepare.runners import check_runner, run_tasks
from demix_jax.data.prepare.storage import Store
from demix_jax.data.prepare.summary import table, warn_of_lost_text
from demix_jax.data.prepare.tasks import (
    ComputeSignatures,
    Task,
    Tokenize,
    drop_name,
    error_context,
    signatures_name,
)
from demix_jax.data.prepare.train_tokenizer import (
    sample_text,
    tokenizer_domains,
    train_sentencepiece,
)
from demix_jax.data.sources.base import SPLITS, Part, Source
from demix_jax.data.sources.resolve import Domains, find_domains
from demix_jax.data.sources.text_files import TextFiles
from demix_jax.data.token_files import INDEX, counts_name, index_name, token_dtype, token_name
from demix_jax.data.tokenizers import (
    RoundTrip,
    Tokenizer,
    load_tokenizer,
    open_tokenizer,
    read_meta,
    save_tokenizer,
)
from demix_jax.errors import DemixError
from demix_jax.files import resolve_path
from demix_jax.folder_lock import lock_folder
from demix_jax.typed_files import fits

_FORMAT = 3  # of the token files; a change rebuilds them
LOCK = ".lock"  # name of the file that the process holds which prepares
_STAGING = ".tokenizer."  # begins the name of a folder in which a tokenizer is made
_REQUESTS = 32  # files read at once: buckets are slow to answer
_BUILD = re.compile(r"[0-9a-f]{12}")
_FORMER = {f"{s}.{end}" for s in SPLITS for end in ("tokens", "index.npy")}  # of format 1
Meta = dict[str, Any]


def prepare(
    config: Config,
    *,
    runner: str = "local",
    workers: int = 0,
    beam_options: Sequence[str] = (),
    beside: bool = False,
) -> dict[str, Meta]:
    """Brings `config.data.dir` up to date; prints a table and returns each domain's meta.

    Args:
      config: settings of the data.
      runner: "local", or a runner of Apache Beam; the files are the same.
      workers: number of processes of the local runner; 0 means one for each core.
      beam_options: flags of the Beam pipeline.
      beside: True to keep the domains that the folder has, and to add those of `config` to them.

    Raises:
      DemixError: unknown, missing, empty or too small domains, unreadable text, a full disk, or a
        folder that was prepared with another tokenizer or is being prepared. Finished files stay.
    """
    check_runner(runner, workers, beam_options)
    store = Store(resolve_path(config.data.dir))
    domains = find_domains(config.data)
    run = functools.partial(run_tasks, runner=runner, workers=workers, beam_options=beam_options)
    with lock_folder(Path(store.root), "prepare", LOCK) if store.is_local else nullcontext():
        kept = _kept_names(store, domains) if beside else _no_names()
        return _prepare(config, store, domains, kept, run)


def _kept_names(store: Store, domains: Domains) -> "_Names":
    """Returns what a folder has besides `domains`; refuses to replace its training domains."""
    known = found if fits(found := store.read_json("data.json"), _Names) else _no_names()
    names = {*domains.train, *domains.novel}
    if taken := sorted(names.intersection(known["train"])):
        raise DemixError(
            f"{taken[0]!r} is a training domain of {store.root}; give the text another name"
        )
    return {
        "train": known["train"],
        "novel": [name for name in known["novel"] if name not in names],
        "builds": {name: build for name, build in known["builds"].items() if name not in names},
        "common": [pair for pair in known["common"] if not names.intersection(pair[:2])],
    }


def _prepare(
    config: Config,
    store: Store,
    domains: Domains,
    kept: "_Names",
    run: Callable[[list[Task], str], None],
) -> dict[str, Meta]:
    """Brings the folder up to date, but for what is `kept`; `run` runs tasks."""
    tokenizer = _make_tokenizer(config, store, domains)
    builds = [_Build(config, store, tokenizer, *item) for item in domains.sources.items()]
    stale = [build for build in builds if not build.is_current()]
    for build in stale:
        print(f"preparing {build}", flush=True)
        build.remove_damaged()
    if undecided := [build for build in stale if not build.is_deduplicated()]:
        run([task for build in undecided for task in build.signature_tasks()], "finding duplicates")
        for build in undecided:
            build.drop_duplicates()
    run([task for build in stale for task in build.tokenize_tasks()], "tokenizing")
    for build in stale:
        build.finish()
    metas = {build.name: build.meta for build in builds}
    for name, meta in metas.items():
        _check_size(name, meta, config.model.context, is_novel=name in domains.novel)
    print(table(metas, domains.novel))
    warn_of_lost_text(metas)
    for one, other, count in _record(store, domains, builds, kept):
        print(f"warning: domains {one!r} and {other!r} have {count:,} documents in common")
    print(f"prepared data: {store.root}")
    return metas


class _Names(dataset.PreparedNames):
    """The contents of `data.json`."""

    builds: dict[str, str]
    common: list[tuple[str, str, int]]


class _Meta(dataset.Meta):
    """The contents of `meta.json`."""

    format: int
    fingerprint: str
    stamp: str
    dedup: str
    files: str
    broken: list[str]
    duplicates: dict[str, Any]


def _no_names() -> _Names:
    return {"train": [], "novel": [], "builds": {}, "common": []}


class _Build:
    """The token files of one domain, as they should be.

    Attributes:
      name: name of the domain.
      meta: content of `meta.json`; {} until there is one.
    """

    def __init__(
        self, config: Config, store: Store, tokenizer: Tokenizer, name: str, source: Source
    ):
        data = config.data
        self.name, self._root, self._source = name, store, source
        self._store, self._allowed = store.subfolder(name), data.skip_bad_lines
        self._dedup, self._threshold = data.dedup, data.dedup_threshold
        self._dtype = token_dtype(tokenizer.vocab_size)
        for entry in self._store.names():
            if not (entry.startswith(".") or entry == "meta.json" or _is_ours(entry)):
                raise DemixError(
                    f"domain {name!r}: {self._store.url(entry)} is not prepared data, which go "
                    "into this folder; use another --data_dir"
                )
        found = self._store.read_json("meta.json")
        self.meta: Meta = found if fits(found, _Meta) else {}  # of an earlier format, or damaged
        self._cheap_fingerprint = source.cheap_fingerprint()
        known = self._cheap_fingerprint, _FORMAT
        same = (self.meta.get("stamp"), self.meta.get("format")) == known
        self._wanted = {
            "format": _FORMAT,
            "fingerprint": self.meta["fingerprint"] if same else source.fingerprint(),
            "tokenizer": tokenizer.hash,
            "dedup": self._dedup if self._dedup != "near" else f"near {self._threshold:g}",
        }
        key = json.dumps(self._wanted, sort_keys=True).encode()
        self._build = self._store.subfolder(hashlib.sha256(key).hexdigest()[:12])

    @property
    def _build_name(self) -> str:
        return self._build.root.rpartition("/")[2]

    def __str__(self) -> str:
        size = sum(part.size for part in self._parts)
        parts = f"{len(self._parts)} part{'s' * (len(self._parts) != 1)}"
        left_out = self._source.left_out() if isinstance(self._source, TextFiles) else []
        names = ", ".join(map(ascii, left_out[:5])) + (", ..." if len(left_out) > 5 else "")
        without = f", without {len(left_out)} files that are no data: {names}" if names else ""
        return f"{self.name}: {size / 1e6:,.1f} MB in {parts}{without}"

    @functools.cached_property
    def _parts(self) -> Sequence[Part]:
        return self._source.parts()

    def is_current(self) -> bool:
        """Returns True if `meta.json` and the files it counts are what they should be."""
        if {key: self.meta.get(key) for key in self._wanted} != self._wanted:
            return False
        if (self.meta["build"], self.meta["files"]) != (self._build_name, self._files()):
            print(f"{self.name}: files are missing or damaged", flush=True)
            return False
        self._check_broken(self.meta["broken"])
        if self.meta["stamp"] != self._cheap_fingerprint:
            self.meta["stamp"] = self._cheap_fingerprint
            self._store.write_json("meta.json", self.meta)
        return True

    def remove_damaged(self) -> None:
        """Deletes the counts of parts whose files have wrong sizes, so that they are made again."""
        sizes = self._build.sizes()
        made = [i for i in range(len(self._parts)) if counts_name(i) in sizes]
        for i, counts in zip(made, self._read_counts(made), strict=True):
            expected = {}
            for split in SPLITS if counts else ():
                expected[token_name(split, i)] = counts[split]["tokens"] * self._dtype.itemsize
                expected[index_name(split, i)] = counts[split]["documents"] * INDEX.itemsize
            if not (counts and expected.items() <= sizes.items()):
                self._build.delete(counts_name(i))

    def is_deduplicated(self) -> bool:
        """Returns True if the documents to leave out are known."""
        masks = {*map(drop_name, range(len(self._parts)))}
        counted = self._build.read_json("duplicates.json")
        known = fits(counted, dict[str, SplitCounts]) and counted.keys() == {*SPLITS}
        return self._dedup == "none" or (known and masks <= set(self._build.names()))

    def tokenize_tasks(self) -> list[Task]:
        """Returns the tasks that make the token files."""
        shared = (self._build, self._allowed, self._root, self._dedup != "none")
        return [Tokenize(self.name, i, part, *shared) for i, part in enumerate(self._parts)]

    def signature_tasks(self) -> list[Task]:
        """Returns the tasks that make the signatures by which duplicates are found."""
        shared = (self._build, self._allowed, self._dedup == "near")
        return [
            ComputeSignatures(self.name, i, part, *shared) for i, part in enumerate(self._parts)
        ]

    def drop_duplicates(self) -> None:
        """Writes for every part a mask of the documents to leave out."""
        paths = [self._build.fetch(signatures_name(i)) for i in range(len(self._parts))]
        masks, counts = find_duplicates(paths, self._dedup == "near", self._threshold)
        with error_context(self.name):
            for i, mask in enumerate(masks):
                with self._build.writing(drop_name(i)) as path, path.open("wb") as file:
                    np.save(file, mask)
            self._build.write_json("duplicates.json", {s: c._asdict() for s, c in counts.items()})

    def finish(self) -> None:
        """Counts the parts, writes `meta.json` for them, and deletes the older build."""
        parts = self._read_counts(range(len(self._parts)))
        if damaged := [i for i, counts in enumerate(parts) if not counts]:
            name = self._build.url(counts_name(damaged[0]))
            raise DemixError(f"{name} is damaged; delete it, then repeat the same command")
        broken = [message for part in parts for message in part.get("broken", ())]
        self._check_broken(broken)
        self._sweep()
        self.meta = self._wanted | {
            "stamp": self._cheap_fingerprint,
            "build": self._build_name,
            "dtype": self._dtype.name,
            "splits": {split: _total([part[split] for part in parts]) for split in SPLITS},
            "broken": broken,
            "round_trip": sum(
                (RoundTrip(**part["round_trip"]) for part in parts), RoundTrip()
            )._asdict(),
            "duplicates": self._build.read_json("duplicates.json"),
            "files": self._files(),
        }
        with error_context(self.name):
            self._store.write_json("meta.json", self.meta)
        for name in self._store.names():
            if name != self.meta["build"] and (_is_ours(name) or name.startswith(".meta.json.")):
                self._store.delete(name)

    def keys(self) -> Iterator[np.ndarray]:
        """Yields 64-bit hashes of the documents, an array for every index file."""
        for split, i in itertools.product(SPLITS, range(len(self._parts))):
            path = self._build.fetch(index_name(split, i))
            if path.stat().st_size:
                yield np.memmap(path, INDEX, mode="r")["key"]

    def _read_counts(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """Reads the counts of parts; {} for one whose file is damaged."""

        def read(number: int) -> dict[str, Any]:
            try:
                counts = self._build.read_json(counts_name(number))
            except DemixError:
                return {}
            return counts if fits(counts, dataset.PartCounts) else {}

        with ThreadPoolExecutor(_REQUESTS) as threads:
            return list(threads.map(read, numbers))

    def _check_broken(self, broken: Sequence[str]) -> None:
        if len(broken) > self._allowed:
            raise DemixError(
                f"domain {self.name!r}: {len(broken)} broken lines, {self._allowed} were allowed; "
                f"the last: {broken[-1]}"
            )

    def _sweep(self) -> None:
        """Deletes files that are no longer needed, and those that killed processes left."""
        made = range(len(self._parts))
        kept = {
            name(split, i) for name in (token_name, index_name) for split in SPLITS for i in made
        }
        kept |= {name(i) for name in (counts_name, drop_name) for i in made} | {"duplicates.json"}
        for name in self._build.names():
            if name not in kept:
                self._build.delete(name)

    def _files(self) -> str:
        """Returns a digest of the names and sizes of the build's files."""
        sizes = sorted(self._build.sizes().items())
        return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16]


def _is_ours(name: str) -> bool:
    """Returns True if an entry of a domain's folder is a build, or a file of an earlier format."""
    return bool(_BUILD.fullmatch(name)) or name in _FORMER


def _record(
    store: Store, domains: Domains, builds: Sequence[_Build], kept: _Names
) -> list[tuple[str, str, int]]:
    """Brings `data.json` up to date, with the domains that are `kept` before all others.

    Returns pairs of domains that share documents, and counts.
    """
    wanted = {
        "train": [*kept["train"], *domains.train],
        "novel": [*kept["novel"], *domains.novel],
        "builds": kept["builds"] | {build.name: build.meta["build"] for build in builds},
    }
    known = store.read_json("data.json")
    if {key: known.get(key) for key in wanted} != wanted or not fits(known, _Names):
        common = common_documents({build.name: build.keys for build in builds})
        pairs = [*kept["common"], *((*pair, count) for pair, count in common.items())]
        known = wanted | {"common": pairs}
        store.write_json("data.json", known)
    return known["common"]


def _total(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the counts of a split: of all parts together, and the tokens of each."""
    tokens = [part["tokens"] for part in parts]
    filled = sum(count > 0 for count in tokens)
    return {
        "documents": sum(part["documents"] for part in parts),
        "tokens": sum(tokens) - max(0, filled - 1),  # parts share the <eod> between them
        "bytes": sum(part["bytes"] for part in parts),
        "sha256": hashlib.sha256("".join(part["sha256"] for part in parts).encode()).hexdigest(),
        "parts": tokens,
    }


def _make_tokenizer(config: Config, store: Store, domains: Domains) -> Tokenizer:
    """Returns the folder's tokenizer; made at first use, then kept: checkpoints depend on it."""
    asked: dict[str, Any] = {"tokenizer": config.data.tokenizer}
    if config.data.tokenizer == "sentencepiece":
        asked["vocab_size"] = config.data.vocab_size
        if config.train.trunk_domains:
            asked["domains"] = list(config.train.trunk_domains)
    if store.exists("tokenizer"):
        folder = store.fetch("tokenizer")
        made, tokenizer = read_meta(folder), load_tokenizer(folder)
        if config.data.tokenizer == "sentencepiece":  # trained here, by this request
            same = made["asked"] == asked
        else:  # wherever its file is, what is in it decides
            same = open_tokenizer(config.data.tokenizer).hash == tokenizer.hash
        if same:
            return tokenizer
        if store.exists("data.json"):
            raise DemixError(
                f"{store.root} was prepared with tokenizer {made['asked']}, asked for {asked}; "
                "use another --data_dir or ask for the same tokenizer"
            )
        store.delete("tokenizer")  # no run can depend on what was never finished
    for name in store.names():  # left by a killed command
        if name.startswith(_STAGING):
            store.delete(name)
    parent = Path(store.root) if store.is_local else None  # to be renamed into the store
    if parent:
        parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=_STAGING, dir=parent) as temporary:
        definition: str | Path = config.data.tokenizer
        trained_on: Sequence[str] | None = None
        if config.data.tokenizer == "sentencepiece":
            print(f"training a sentencepiece tokenizer of {asked['vocab_size']} pieces", flush=True)
            definition = Path(temporary) / "sentencepiece.model"
            train_sentencepiece(sample_text(config, domains), config.data.vocab_size, definition)
            trained_on = tokenizer_domains(config, domains)
        tokenizer = save_tokenizer(
            definition, Path(temporary) / "tokenizer", asked, trained_on=trained_on
        )
        store.publish(Path(temporary) / "tokenizer", "tokenizer")
    return tokenizer


def _check_size(name: str, meta: Meta, context: int, *, is_novel: bool) -> None:
    """Raises DemixError unless a domain has held-out text and, to train on, one sequence."""
    splits = meta["splits"]
    needed = {"valid": 2, "test": 2} | ({} if is_novel else {"train": context + 1})
    for split, tokens in needed.items():
        if splits[split]["tokens"] < tokens:
            counts = ", ".join(f"{s}: {c['documents']} documents" for s, c in splits.items())
            raise DemixError(
                f"domain {name!r} is too small: split {split!r} has {splits[split]['tokens']} "
                f"tokens, needs at least {tokens} ({counts}); add documents or drop the domain"
            )
