"""`demix score`: the experts and their mixture on texts of unknown domain."""

import contextlib
import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from demix_jax.checkpoint.run_dir import Run, load_run
from demix_jax.data.batch import Batch
from demix_jax.data.sources.resolve import is_described, read_place
from demix_jax.data.sources.text_files import read_jsonl
from demix_jax.errors import DemixError
from demix_jax.evaluation.mixture import Mixture, resolve_mixture
from demix_jax.evaluation.scorer import LoadedExperts
from demix_jax.files import check_output, open_whole, resolve_path
from demix_jax.mixing.stream import make_stream, mix_tokens


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
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

    @property
    def nats_per_token(self) -> float:
        """Returns the loss of the mixture; NaN without tokens."""
        tokens = int(self.mask.sum())
        return float(-self.mixture_logprobs.sum(dtype=np.float64)) / tokens if tokens else math.nan

    @property
    def mean_posterior(self) -> np.ndarray:
        """Returns the weights [D], averaged over all tokens; 0 without tokens."""
        return self.posterior.sum((0, 1)) / max(1, self.mask.sum())

    def __repr__(self) -> str:
        texts, tokens = len(self.tokens), int(self.mask.sum())
        return (
            f"Scores({texts} texts, {tokens:,} tokens: {self.nats_per_token:.4f} nats/token under "
            f"the mixture; mean posterior: {named_weights(self.experts, self.mean_posterior)})"
        )


def score_file(
    workdir: Path,
    source: str | Path,
    output: Path,
    *,
    prior: str = "uniform",
    switch_rate: float | None = None,
    top_k: int = 0,
    batch_size: int = 16,
    fallback: bool = False,
) -> Scores:
    """Scores the texts of a file, a pipe or a dataset under a run's newest checkpoint.

    See `score_texts`.

    With a cached prior and `top_k`, only those experts are loaded and run, and they are all that
    the result holds.

    Args:
      workdir: folder of the run.
      source: JSON lines of {"text": ...}, of which what is no plain file is read once; or a place
        as `data.sources` has them.
      output: .npz file of `Scores`, or a pipe.
      prior: uniform, updating (carried from text to text) or cached:NAME.
      switch_rate: s in [0, 1]; None means the cached prior's, else 0.
      top_k: number of experts kept; 0 means all.
      batch_size: number of sequences scored at once, of as many as there are.
      fallback: True to take the newest step that is whole, if the newest is damaged.

    Raises:
      DemixError: no texts, a prior that does not exist or belongs to other experts, numbers out of
        range, or `output` is `source` or a folder.
    """
    check_output(output)
    file = Path(resolve_path(source))
    if output.exists() and file.exists() and output.samefile(file):
        raise DemixError(f"--output {output} is the --input; the scores would replace the texts")
    checkpoint = load_run(workdir, fallback=fallback).latest()
    run = checkpoint.run
    mixture = resolve_mixture(checkpoint, checkpoint.experts, prior, switch_rate, top_k)
    check_needs_no_domain(run)
    texts = read_texts(source)
    loaded = LoadedExperts(run, checkpoint.step, mixture.experts, batch_size=batch_size)
    scores = score_texts(loaded, mixture, texts, label=file.name)
    _write(output, scores)
    return scores


def score_texts(
    loaded: LoadedExperts, mixture: Mixture, texts: Sequence[str], *, label: str = "texts"
) -> Scores:
    """Scores texts under experts and their mixture.

    Every text begins after an end-of-document token. A text longer than the context is split into
    sequences, over which its weights carry on. A text without tokens has an empty row.

    Args:
      loaded: experts, those of the mixture among them.
      mixture: experts and weights of the result.
      texts: texts.
      label: name of the texts in the progress bar and in errors.
    """
    run = loaded.run
    check_needs_no_domain(run)
    sequences, lengths = _sequences(run, texts)
    logprobs = loaded.logprobs(sequences.tokens, sequences.mask, label=label, names=mixture.experts)
    stream = make_stream(sequences.tokens, sequences.mask, logprobs, run.tokenizer.eod)
    log_weights, mixed = mix_tokens(
        stream,
        mixture.prior,
        mixture.switch_rate,
        updating=mixture.updating,
        top_k=mixture.top_k,
    )
    scored = sequences.mask.ravel()
    by_token = logprobs.reshape(len(logprobs), -1)[:, scored].T
    flat = sequences.tokens[:, 1:].ravel()[scored], by_token
    posterior, mixed = (x[: len(scored)][scored] for x in (np.exp(log_weights), mixed))
    tokens, by_expert, posterior, mixed = (_by_text(x, lengths) for x in (*flat, posterior, mixed))
    counts = np.array(lengths, np.int32)
    return Scores(
        tokens=tokens,
        mask=np.arange(tokens.shape[1]) < counts[:, None],
        lengths=counts,
        experts=np.array(mixture.experts),
        token_logprobs=np.moveaxis(by_expert, -1, 0),
        posterior=posterior,
        mixture_logprobs=mixed,
        prior=mixture.prior.astype(np.float32),
    )


def check_needs_no_domain(run: Run) -> None:
    """Raises DemixError for a model that reads a domain's token before every text."""
    if run.config.variant == "domain_token":
        raise DemixError(f"{run.workdir} needs a domain token for every text; use `demix evaluate`")


def named_weights(experts: Sequence[str] | np.ndarray, weights: np.ndarray) -> str:
    """Returns the largest of the weights [D] with their experts' names, as text."""
    return ", ".join(f"{experts[i]} {weights[i]:.2f}" for i in np.argsort(-weights)[:8])


def read_texts(place: str | Path) -> list[str]:
    """Reads the texts of JSON lines of {"text": ...}, in a file or pipe, or of any described place.

    Raises:
      DemixError: no such file, a broken line, or no text.
    """
    if is_described(str(place)):
        texts = [document.text for document in read_place(str(place))]
        if not texts:
            raise DemixError(f"{place} holds no texts")
        return texts
    source = Path(resolve_path(place))
    if not source.exists():
        raise DemixError(f"input file {source} does not exist")
    if source.is_dir():
        raise DemixError(f"input {source} is a folder; name a file of JSON lines")
    with _plain_file(source) as file:
        try:
            found = list(read_jsonl(str(file)))
        except DemixError as error:
            raise DemixError(str(error).replace(str(file), str(source))) from None
    if not found:
        raise DemixError(
            f"{source} holds no texts; expected lines of {json.dumps({'text': '...'})}"
        )
    return [document.text for document in found]


def check_texts(texts: Sequence[str], what: str = "text") -> None:
    """Raises DemixError if there are no texts, or one that is no UTF-8."""
    if not texts:
        raise DemixError(f"no {what}s; give one or more")
    for i, text in enumerate(texts, start=1):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise DemixError(f"{what} {i} has a lone surrogate, which is no UTF-8") from None


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


def _sequences(run: Run, texts: Sequence[str]) -> tuple[Batch, list[int]]:
    """Splits every text, after an end-of-document token, by the context; counts its tokens too."""
    context = run.config.model.context
    rows, masks, lengths = [], [], []
    for ids in run.tokenizer.encode_batch(texts):
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
        np.savez(file, **vars(scores))
    if len(empty := np.flatnonzero(scores.lengths == 0)):
        numbers = ", ".join(str(i + 1) for i in empty[:8]) + ", ..." * (len(empty) > 8)
        total = len(scores.tokens)
        print(f"warning: {len(empty)} of {total} texts have no tokens and empty rows: {numbers}")
    if scores.mask.any():
        texts, tokens, nats = len(scores.tokens), int(scores.mask.sum()), scores.nats_per_token
        print(f"{texts} texts, {tokens:,} tokens: {nats:.4f} nats/token under the mixture")
        print(f"mean posterior: {named_weights(scores.experts, scores.mean_posterior)}")
    print(f"scores: {output}")
