"""`demix score`: the experts and their mixture on texts of unknown domain."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from demix_jax.checkpoint.run_dir import Run, load_run
from demix_jax.data.batch import Batch
from demix_jax.data.sources.base import Document
from demix_jax.data.sources.text_files import read_jsonl
from demix_jax.errors import DemixError
from demix_jax.evaluation.cached_priors import require_prior, top_experts, weights_of
from demix_jax.evaluation.scorer import LoadedExperts
from demix_jax.files import check_output, open_whole
from demix_jax.mixing.filter import check_switch_rate, check_top_k
from demix_jax.mixing.stream import make_stream, mix_tokens


class Scores(NamedTuple):
    """The contents of the output of `demix score`; N texts, T tokens of the longest, D experts.

    Attributes:
      tokens: [N, T] int32, 0 where a text has ended.
      mask: [N, T] bool, False where a text has ended.
      lengths: [N] int32, tokens of each text; 0 marks one that has none, whose row is empty.
      experts: [D] names.
      token_logprobs: [D, N, T] float32 nats, 0 where masked.
      posterior: [N, T, D] float32, the weights used for each token, before it was seen.
      mixture_logprobs: [N, T] float32 nats, 0 where masked.
      prior: [D] float32, the weights before the first token of the first text.
    """

    tokens: np.ndarray
    mask: np.ndarray
    lengths: np.ndarray
    experts: np.ndarray
    token_logprobs: np.ndarray
    posterior: np.ndarray
    mixture_logprobs: np.ndarray
    prior: np.ndarray


def score_file(
    workdir: Path,
    source: Path,
    output: Path,
    *,
    prior: str = "uniform",
    switch_rate: float | None = None,
    top_k: int = 0,
    batch_size: int = 16,
) -> Scores:
    """Scores the texts of a JSON-lines file or pipe under a run's newest checkpoint.

    Every text begins after an end-of-document token. A text longer than the context is split into
    sequences, over which its weights carry on. With a cached prior and `top_k`, only those experts
    are loaded and run, and they are all that the result holds.

    Args:
      workdir: folder of the run.
      source: JSON lines of {"text": ...}; what is no plain file is read once.
      output: .npz file of `Scores`, or a pipe.
      prior: uniform, updating (carried from text to text) or cached:NAME.
      switch_rate: s in [0, 1]; None means the cached prior's, else 0.
      top_k: number of experts kept; 0 means all.
      batch_size: number of sequences scored at once, of as many as there are.

    Raises:
      DemixError: no texts, a prior that does not exist or belongs to other experts, numbers out of
        range, or `output` is `source` or a folder.
    """
    check_output(output)
    if output.exists() and source.exists() and output.samefile(source):
        raise DemixError(f"--output {output} is the --input; the scores would replace the texts")
    run = load_run(workdir)
    if run.config.variant == "domain_token":
        raise DemixError(f"{workdir} needs a domain token for every text; use `demix evaluate`")
    checkpoint = run.latest()
    run = checkpoint.run
    check_top_k(top_k or None, len(checkpoint.experts))
    kind, _, name = prior.partition(":")
    weights, names = (
        np.full(len(checkpoint.experts), 1 / len(checkpoint.experts)),
        checkpoint.experts,
    )
    if kind == "cached" and name:
        cached = require_prior(workdir, name, checkpoint)
        names = top_experts(cached, top_k or len(cached.experts))
        weights = weights_of(cached, names, names)
        switch_rate = cached.switch_rate if switch_rate is None else switch_rate
    elif prior not in ("uniform", "updating"):
        raise DemixError(f"unknown prior {prior!r}; use uniform, updating or cached:NAME")
    check_switch_rate(switch_rate or 0.0)
    texts = _read(source)
    sequences, lengths = _sequences(run, texts)
    loaded = LoadedExperts(run, checkpoint.step, names, batch_size=batch_size)
    logprobs = loaded.logprobs(sequences.tokens, sequences.mask, label=source.name)
    stream = make_stream(sequences.tokens, sequences.mask, logprobs, run.tokenizer.eod)
    log_weights, mixture = mix_tokens(
        stream,
        weights,
        switch_rate or 0.0,
        updating=kind == "updating",
        top_k=top_k if top_k and kind != "cached" else None,
    )
    scored = sequences.mask.ravel()
    flat = sequences.tokens[:, 1:].ravel()[scored], logprobs.reshape(len(names), -1)[:, scored].T
    posterior, mixed = (x[: len(scored)][scored] for x in (np.exp(log_weights), mixture))
    tokens, by_expert, posterior, mixed = (_by_text(x, lengths) for x in (*flat, posterior, mixed))
    counts = np.array(lengths, np.int32)
    mask = np.arange(tokens.shape[1]) < counts[:, None]
    scores = Scores(
        tokens=tokens,
        mask=mask,
        lengths=counts,
        experts=np.array(names),
        token_logprobs=np.moveaxis(by_expert, -1, 0),
        posterior=posterior,
        mixture_logprobs=mixed,
        prior=weights.astype(np.float32),
    )
    _write(output, scores)
    return scores


def _read(source: Path) -> list[Document]:
    if not source.exists():
        raise DemixError(f"input file {source} does not exist")
    if source.is_dir():
        raise DemixError(f"input {source} is a folder; name a file of JSON lines")
    with _plain_file(source) as file:
        try:
            texts = list(read_jsonl(str(file)))
        except DemixError as error:
            raise DemixError(str(error).replace(str(file), str(source))) from None
    if not texts:
        raise DemixError(
            f"{source} holds no texts; expected lines of {json.dumps({'text': '...'})}"
        )
    return texts


@contextlib.contextmanager
def _plain_file(source: Path) -> Iterator[Path]:
    """Yields the file, or a temporary copy of what a pipe gives, which can be read only once."""
    if source.is_file():
        yield source
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / source.name
        with source.open("rb") as pipe, copy.open("wb") as file:
            shutil.copyfileobj(pipe, file)
        yield copy


def _sequences(run: Run, texts: list[Document]) -> tuple[Batch, list[int]]:
    """Splits every text, after an end-of-document token, by the context; counts its tokens too."""
    context = run.config.model.context
    rows, masks, lengths = [], [], []
    for ids in run.tokenizer.encode_batch([document.text for document in texts]):
        stream = np.concatenate([[run.tokenizer.eod], ids])
        lengths.append(len(ids))
        for start in range(0, len(ids), context):
            piece = stream[start : start + context + 1]
            missing = context + 1 - len(piece)
            rows.append(np.pad(piece, (0, missing)))
            masks.append(np.arange(context) < len(piece) - 1)
    if not rows:  # one row of padding, so that arrays have their shapes
        rows, masks = [np.zeros(context + 1)], [np.zeros(context, bool)]
    tokens = np.stack(rows).astype(np.int32)
    return Batch(tokens, np.stack(masks), np.zeros(len(rows), np.int32)), lengths


def _by_text(flat: np.ndarray, lengths: list[int]) -> np.ndarray:
    """Turns [sum of lengths, ...] into [N, longest, ...], zero where a text has ended."""
    padded = np.zeros((len(lengths), max(lengths), *flat.shape[1:]), flat.dtype)
    for row, piece in zip(padded, np.split(flat, np.cumsum(lengths)[:-1]), strict=True):
        row[: len(piece)] = piece
    return padded


def _write(output: Path, scores: Scores) -> None:
    with open_whole(output) as file:
        np.savez(file, **scores._asdict())
    texts, tokens = len(scores.tokens), int(scores.mask.sum())
    if len(empty := np.flatnonzero(scores.lengths == 0)):
        numbers = ", ".join(str(i + 1) for i in empty[:8]) + ", ..." * (len(empty) > 8)
        print(f"warning: {len(empty)} of {texts} texts have no tokens and empty rows: {numbers}")
    if tokens:
        per_token = -scores.mixture_logprobs.sum() / tokens
        mean = scores.posterior.sum((0, 1)) / tokens
        order = np.argsort(-mean)
        named = ", ".join(f"{scores.experts[i]} {mean[i]:.2f}" for i in order[:8])
        print(f"{texts} texts, {tokens:,} tokens: {per_token:.4f} nats/token under the mixture")
        print(f"mean posterior: {named}")
    print(f"scores: {output}")
