"""The readers of files that are fuzzed: whole files to begin with, and a function that reads one.

Each reader goes on as its callers do, to the point where the content would be used. It may raise a
DemixError and nothing else.
"""

import bz2
import functools
import gzip
import hashlib
import json
import lzma
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import edits
import numpy as np
import tiny
import tokenizers
import zstandard

from demix_jax.checkpoint.arrays import leaf_names, read_item, verify_item
from demix_jax.checkpoint.checkpointer import (
    check_listing,
    item_templates,
    read_manifest,
    write_listing,
)
from demix_jax.checkpoint.metrics_log import drop_lines_after
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.config.serialization import config_hash, read_saved
from demix_jax.data.dataset import PreparedData
from demix_jax.data.prepare.dedup import Signatures, compute_signatures
from demix_jax.data.prepare.storage import Store
from demix_jax.data.prepare.train_tokenizer import train_sentencepiece
from demix_jax.data.sources.base import BadRecords
from demix_jax.data.sources.text_files import JsonLines, PlainText, find_files
from demix_jax.data.tokenizers import load_tokenizer, open_tokenizer
from demix_jax.errors import DemixError
from demix_jax.evaluation.cached_priors import CachedPrior, read_priors, remap_prior, save_prior
from demix_jax.experts.fingerprints import fingerprint_files, scan
from demix_jax.experts.lifecycle import (
    add_experts,
    export_experts,
    remove_experts,
    rename_experts,
)
from demix_jax.experts.safetensors_io import check_part, map_part, read_card
from demix_jax.experts.statement import list_experts
from demix_jax.experts.transaction import read_receipts
from demix_jax.experts.verify import search
from demix_jax.model.optimizer import make_optimizer
from demix_jax.report import page
from demix_jax.report.results import read_rows
from demix_jax.report.settings import read_results
from demix_jax.report.tables import change_table
from demix_jax.typed_files import read_array, read_arrays

Reader = Callable[[], object]


class Target(NamedTuple):
    """A reader of one file.

    Attributes:
      path: file that gets every input.
      seeds: whole contents, to be mutated.
      read: function that reads the file as its callers do.
      pack: function from mutated content to what is written: compressed, or with right checksums.
    """

    path: Path
    seeds: Sequence[bytes]
    read: Reader
    pack: Callable[[bytes], bytes] = bytes

    def run(self, data: bytes) -> str:
        """Reads one input; returns "read" or "refused", or raises what should not be raised."""
        self.path.write_bytes(self.pack(data))
        try:
            self.read()
        except DemixError as error:
            text = str(error)
            if "\n" in text or not text.isprintable() or len(text) > 25_000:
                raise AssertionError(f"no plain line: {text[:2000]!r}") from None
            return "refused"
        return "read"


def make_targets(folder: Path) -> dict[str, Target]:
    """Makes a run, prepared data, exports and results in a new folder; returns all targets."""
    run = edits.make_run(folder / "run", ("law", "med", "code"))
    add_experts(run, ["copy"], ["law"])
    remove_experts(run, ["code"])
    rename_experts(run, {"med": "acts"})
    newest = load_run(run).latest()
    weights = dict.fromkeys(newest.experts, 1 / len(newest.experts))
    prior = CachedPrior(
        "law", newest.experts, tuple(weights.values()), 0.1, 0.0, 9, newest.params_hash
    )
    save_prior(run, prior)
    made: dict[str, Target] = {}
    for group in (_text, _data, _run, _experts, _arrays, _tokenizers, _results):
        made |= group(folder, run)
    from torture.http_targets import make_http_targets  # it is made of the class above

    return made | make_http_targets(folder, run)


def _file(path: Path, read: Callable[[], object], *more: bytes) -> Target:
    return Target(path, (path.read_bytes(), *more), read)


def _text(folder: Path, run: Path) -> dict[str, Target]:
    """Targets of text: JSON lines and plain, as they are and compressed."""
    rows = [{"text": f"{text}\u00e9", "id": i, "split": "train", "a": {"b": "c"}}
            for i, text in enumerate(tiny.sentences("law", 12))]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    packs: dict[str, Callable[[bytes], bytes]] = {
        "": bytes,
        ".gz": functools.partial(gzip.compress, mtime=0),
        ".zst": lambda data: zstandard.compress(data),
        ".bz2": bz2.compress,
        ".xz": lzma.compress,
    }
    made = {}
    for ending, pack in packs.items():
        for name, data in (("lines.jsonl", lines), ("document.txt", lines[:500])):
            path = folder / f"text{ending}" / (name + ending)
            path.parent.mkdir(exist_ok=True)
            read = functools.partial(_read_text, path)
            made[f"text {name}{ending}, packed again"] = Target(path, [data], read, pack)
            if ending:
                made[f"text {name}{ending}"] = Target(path, [pack(data)], read)
    return made


def _read_text(path: Path) -> None:
    broken = BadRecords(3)
    (file,) = find_files(str(path))
    part = JsonLines(file) if ".jsonl" in path.name else PlainText(file)
    for document in part.documents(broken):
        document.text.encode()
        hash(document.id)
        assert document.split in (None, "train", "valid", "test")


def _data(folder: Path, run: Path) -> dict[str, Target]:
    """Targets of prepared data; tokens and indexes also with the right checksums."""
    data = folder / "run-data"
    build = data / "law" / "build"
    counts = json.loads((build / "00000.json").read_text())
    whole_tokens = (build / "train-00000.tokens").read_bytes()

    def read() -> None:
        prepared = PreparedData(data)
        for domain in (*prepared.train, *prepared.novel):
            prepared.meta(domain)
        prepared.round_trip("law")
        for split in ("train", "valid", "test"):
            tokens = np.asarray(prepared.tokens("law", split))
            assert tokens.size == 0 or 0 <= tokens.max() < prepared.tokenizer.vocab_size
            for offset, size in prepared.index("law", split):
                assert 0 <= offset < len(tokens)
                assert size >= 0

    def sum_tokens(content: bytes) -> bytes:
        """Writes the checksums of what will be written, which then is read as if it were right."""
        content = content.ljust(len(whole_tokens), b"\0")[: len(whole_tokens)]
        train = counts["train"] | {
            "tokens": len(content) // 2,
            "crc32": [zlib.crc32(content[i : i + 16384]) for i in range(0, len(content), 16384)],
        }
        (build / "00000.json").write_text(json.dumps(counts | {"train": train}))
        return content

    def sum_index(content: bytes) -> bytes:
        content = content[: len(content) // 24 * 24] if len(content) % 5 else content
        train = counts["train"] | {"index_crc32": zlib.crc32(content)}
        (build / "00000.json").write_text(json.dumps(counts | {"train": train}))
        return content

    def whole(read_whole: Reader) -> Reader:
        """Reads, and puts the file of counts right again, as the other targets need it."""

        def read_then_restore() -> None:
            try:
                read_whole()
            finally:
                (build / "00000.json").write_text(json.dumps(counts))

        return read_then_restore

    tokens, index = build / "train-00000.tokens", build / "train-00000.index"
    names = ("data.json", "law/meta.json", "law/build/00000.json", "tokenizer/tokenizer_meta.json")
    made = {f"data {name}": _file(data / name, read) for name in names}
    made["data tokens"] = _file(tokens, read)
    made["data tokens, right sums"] = Target(tokens, [tokens.read_bytes()], whole(read), sum_tokens)
    made["data index"] = _file(index, read)
    made["data index, right sums"] = Target(index, [index.read_bytes()], whole(read), sum_index)
    path = folder / "a.signatures"
    compute_signatures((("train", t) for t in tiny.sentences("law", 5)), False).save(path)
    made["data signatures"] = _file(path, lambda: len(Signatures.load(path)))
    store = Store(str(data))
    made["data store"] = _file(data / "law" / "meta.json", lambda: store.read_json("law/meta.json"))
    return made


def _run(folder: Path, run: Path) -> dict[str, Target]:
    """Targets of a run: identity, manifest, list of items, receipts, priors, metrics."""
    newest = load_run(run).latest()
    step = newest.folder

    def manifest() -> None:
        found = read_manifest(step)
        found.params_hash, found.trunk, found.to_json()
        for name in found.experts:
            found.items_of(name), found.descendants(name), found.provenance[name].to_json()
        for item in found.hashes:
            place = newest.checkpoints.item(found, item)
            assert place.resolve().parent in (step.resolve(), newest.checkpoints.frozen)
        list_experts(run)

    def listing() -> None:
        try:
            check_listing(step, newest.manifest)
        finally:
            write_listing(step, newest.manifest)

    def receipts() -> None:
        found = read_receipts(run)
        for receipt in found.values():
            for name in (*receipt["experts"], *receipt["renamed"], *receipt["renamed"].values()):
                assert (run / "priors" / f"{name}.json").resolve().parent == run / "priors"
        removed = [receipt for receipt in found.values() if receipt["operation"] == "remove"]
        search(folder / "empty", removed, newest.manifest)

    def priors() -> None:
        for prior in filter(None, read_priors(run).values()):
            remap_prior(prior, ("law", "new"), {"copy": "new"}, "-")

    def identity() -> None:
        found = load_run(run)
        config_hash(found.config), found.model, found.experts
        for name in found.domains:
            assert (folder / name).parent == folder

    metrics = folder / "metrics.jsonl"
    line = {"step": 1, "loss": 1.5, "domain_loss": {"law": 1.0}}
    metrics.write_text("".join(json.dumps(line | {"step": i}) + "\n" for i in range(9)))
    (folder / "empty").mkdir()
    saved = folder / "saved.json"
    shutil.copy(run / "run.json", saved)
    made = {
        "run run.json": _file(run / "run.json", identity),
        "run --config": _file(saved, lambda: config_hash(read_saved(saved))),
        "run tokenizer_meta.json": _file(
            run / "tokenizer" / "tokenizer_meta.json", lambda: load_tokenizer(run / "tokenizer")
        ),
        "run manifest": _file(step / "meta" / "metadata", manifest),
        "run listing": _file(step / "_CHECKPOINT_METADATA", listing),
        "run prior": _file(run / "priors" / "law.json", priors),
        "run metrics.jsonl": _file(metrics, lambda: drop_lines_after(metrics, 7)),
    }
    for path in sorted((run / "receipts").iterdir()):
        made[f"run receipt {path.stem}"] = _file(path, receipts)
    return made


def _experts(folder: Path, run: Path) -> dict[str, Target]:
    """Targets of an expert: an exported file, its card, and an item of a checkpoint."""
    newest = load_run(run).latest()
    config = newest.run.config
    optimizer = make_optimizer(config.optim, config.train.steps)
    templates = {k: v.experts for k, v in item_templates(newest.run.model, optimizer).items()}
    (path,) = export_experts(run, ["law"], folder / "law.safetensors")
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + size])
    card = header["__metadata__"]["demix_card"].encode()

    def read() -> None:
        found = read_card(path)
        found.to_json()
        for part in found.hashes:
            if part in templates:
                check_part(path, found, part, map_part(path, found, part, templates[part]))

    def with_card(text: bytes) -> bytes:
        metadata = {"__metadata__": {"demix_card": text.decode(errors="replace")}}
        return _with_header(json.dumps(header | metadata).encode())

    def _with_header(text: bytes) -> bytes:
        return len(text).to_bytes(8, "little") + text + whole[8 + size :]

    item = newest.item("expert.law")
    array = item / leaf_names(item)[0]
    expected = newest.manifest.hashes["expert.law"]

    def read_array_of_item() -> None:
        try:
            read_item(item, templates["expert"], expected)
        finally:
            verify_item(item, expected)

    made = {
        "expert safetensors": Target(path, [whole], read),
        "expert header": Target(path, [whole[8 : 8 + size]], read, _with_header),
        "expert card": Target(path, [card], read, with_card),
    }
    for name in (".zarray", *(p.name for p in array.iterdir() if p.name != ".zarray")):
        made[f"expert item {name}"] = _file(array / name, read_array_of_item)
    return made


def _arrays(folder: Path, run: Path) -> dict[str, Target]:
    """Targets of NumPy's files, and of the search for removed tensors in packed files."""
    npy, npz, packed = folder / "a.npy", folder / "a.npz", folder / "scanned" / "b.bin"
    packed.parent.mkdir()
    arrays = {"run|law": np.ones((3, 4), np.float32), "experts|run": np.array(["law", "med"])}
    np.save(npy, np.arange(7) > 3)
    np.savez(npz, **arrays)
    stored = npz.read_bytes()
    np.savez_compressed(npz, **arrays)
    removed = folder / "removed.bin"
    removed.write_bytes(np.random.default_rng(0).bytes(5000))
    prints = [fingerprint_files("expert.x", [removed])]
    content = b"\0" * 1000 + removed.read_bytes()[:2000]
    seeds = [gzip.compress(content), zstandard.compress(content), bz2.compress(content)]
    seeds += [lzma.compress(content), content]
    return {
        "arrays .npy": _file(npy, lambda: read_array(npy, "-").sum()),
        "arrays .npz": _file(npz, lambda: sum(map(len, read_arrays(npz, "-"))), stored),
        "search in packed files": Target(packed, seeds, lambda: scan(packed.parent, prints)),
    }


def _tokenizers(folder: Path, run: Path) -> dict[str, Target]:
    """Targets of tokenizers: a tokenizer.json of three kinds and a SentencePiece model."""
    texts = tiny.sentences("law", 60) + tiny.sentences("code", 60)
    path, model = folder / "tokenizer.json", folder / "a.model"
    seeds = []
    trainers = tokenizers.trainers
    for kind, trainer in (
        (tokenizers.models.BPE(), trainers.BpeTrainer(vocab_size=90, special_tokens=["</s>"])),
        (tokenizers.models.WordPiece(), trainers.WordPieceTrainer(vocab_size=90)),
        (tokenizers.models.Unigram(), trainers.UnigramTrainer(vocab_size=90, unk_token="?")),
    ):
        made = tokenizers.Tokenizer(kind)
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
        made.decoder = tokenizers.decoders.ByteLevel()
        made.train_from_iterator(texts, trainer)
        seeds.append(made.to_str().encode())
    path.write_bytes(seeds[0])
    train_sentencepiece(texts, 300, model)

    def read(file: Path) -> None:
        tokenizer = open_tokenizer(file)
        ids = tokenizer.encode_batch(["def law(x): return \u00e9", ""])
        assert all((i >= 0).all() and (i < tokenizer.vocab_size).all() for i in ids)
        tokenizer.decode(ids[0].tolist()).encode(errors="replace")

    return {
        "tokenizer.json": Target(path, seeds, lambda: read(path)),
        "tokenizer .model": _file(model, lambda: read(model)),
    }


def _results(folder: Path, run: Path) -> dict[str, Target]:
    """Targets of results: tables in a terminal, and a report."""
    results = folder / "results" / "results.json"
    results.parent.mkdir()
    pairs = [(domain, expert) for domain in ("law", "acts") for expert in ("law", "acts")]
    rows = [_row("known" if e == d else "expert", d, 3.0, expert=e) for d, e in pairs]
    posterior = {"law": 0.75, "acts": 0.25}
    for mode, rate in (("uniform", 0.0), ("updating", 0.1), ("cached", 0.0)):
        more: dict[str, Any] = {"switch_rate": rate, "posterior": posterior}
        more["prior"] = "cached:law" if mode == "cached" else mode
        rows += [_row(mode, domain, 2.9, **more) for domain in ("law", "acts")]
    results.write_text(json.dumps({"rows": rows}))
    np.savez(results.with_name("traces.npz"), **{"r|law": np.ones((1, 5, 2), np.float32)})
    earlier = [dict(row) for row in rows]

    def read() -> None:
        found = read_rows(results)
        change_table(earlier, found)
        data = read_results([results.parent])
        blocks = [*page._averages(data), page._every_result(data)]
        text = page._html_page({"Every": blocks}) + page._markdown_page({"Every": blocks})
        assert "<script" not in text

    def report() -> None:
        try:
            page.report([results.parent], folder / "report")
        finally:
            shutil.rmtree(folder / "report", ignore_errors=True)

    return {
        "results.json": _file(results, read),
        "results.json, whole report": _file(results, report),
    }


def _row(mode: str, domain: str, nats: float, **more: Any) -> dict[str, Any]:
    row = {"run": "r", "variant": "demix", "checkpoint": 7, "domain": domain, "novel": False}
    row |= {"split": "test", "mode": mode, "prior": None, "switch_rate": None, "top_k": None}
    row |= {"expert": None, "tokens": 1000, "bytes": 4000, "nats": 1000 * nats, "posterior": None}
    return row | {"params_hash": hashlib.sha256(b"").hexdigest()[:16]} | more


def names(targets: Iterable[str], chosen: str) -> list[str]:
    """Returns the names of targets that contain a text."""
    return [name for name in targets if chosen in name]
