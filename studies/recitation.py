"""Continuations of training text by a model, compared with the text word for word."""

from collections.abc import Iterable, Sequence

import numpy as np

import demix_jax
from demix_jax.checkpoint.run_dir import load_run
from demix_jax.data.tokenizers import Tokenizer

PREFIX, MATCH, LENGTH = 32, 8, 32  # tokens of the prompt, of a match, and generated


def askable(tokenizer: Tokenizer, candidates: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Returns the candidates that are text of one document, and whose prefix is read again so.

    Args:
      tokenizer: tokenizer of the text.
      candidates: tokens, [PREFIX + LENGTH] each; shorter ones are left out.
    """
    found = []
    for ids in map(np.asarray, candidates):
        (again,) = tokenizer.encode_batch([tokenizer.decode(ids[:PREFIX].tolist())])
        whole = len(ids) == PREFIX + LENGTH and tokenizer.eod not in ids
        if whole and np.array_equal(again, ids[:PREFIX]):
            found.append(ids)
    return found


def matched(lm: demix_jax.LanguageModel, texts: Sequence[np.ndarray], samples: int) -> np.ndarray:
    """Returns how many tokens of each continuation are the text's, up to the first other.

    Args:
      lm: model, whose experts write together from uniform weights.
      texts: tokens of texts, [PREFIX + LENGTH] each.
      samples: continuations drawn at temperature 1 for each text; 0 means the most probable one.
    """
    tokenizer = load_run(lm.workdir).tokenizer
    prompts = [tokenizer.decode(ids[:PREFIX].tolist()) for ids in texts]
    counts = []
    for seed in range(max(1, samples)):
        made = lm.generate(
            prompts,
            max_tokens=LENGTH,
            temperature=1.0 if samples else 0.0,
            seed=seed,
            batch_size=32,
        )
        for one, ids in zip(made, texts, strict=True):
            new = one.tokens[len(one.tokens) - one.generated :]
            same = new == ids[PREFIX : PREFIX + len(new)]
            counts.append(len(same) if same.all() else int(same.argmin()))
    return np.array(counts)


def percent(counts: np.ndarray) -> float:
    """Returns the percentage of continuations whose first MATCH tokens are all the text's."""
    return 100 * float((counts >= MATCH).mean())
