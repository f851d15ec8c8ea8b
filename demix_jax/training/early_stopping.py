"""Early stopping: the parameters with the lowest validation loss, and when to give up.

With a frozen trunk the experts of a run learn alone, so each keeps its own best step. Otherwise
there is one best step for all parameters.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from demix_jax.model.params import Params


class Best(NamedTuple):
    """The best validations so far; one number per expert, or one in all.

    Attributes:
      losses: lowest validation losses in nats per token.
      steps: steps of these losses.
      waited: numbers of validations since then.
      first: losses before training.
    """

    losses: list[float]
    steps: list[int]
    waited: list[int]
    first: list[float]


class EarlyStopping:
    """The best parameters of a training, and the decision to end it.

    Attributes:
      params: best trained halves so far; None before the first validation.
      best: losses and steps of `params`.
    """

    def __init__(self, patience: int, params: Params | None = None, best: Best | None = None):
        self._patience, self.params, self.best = patience, params, best

    @property
    def done(self) -> bool:
        """Returns True if every part has waited too long for an improvement."""
        return self.best is not None and min(self.best.waited) >= self._patience

    def see(self, step: int, losses: np.ndarray, params: Params) -> None:
        """Records a validation: `losses` [G], where G is 1 or the number of experts."""
        if self.best is None or self.params is None:
            found, parts = losses.tolist(), len(losses)
            self.best = Best(found, [step] * parts, [0] * parts, found)
            self.params = jax.tree.map(jnp.copy, params)  # the step donates its buffers
            return
        waited = np.array(self.best.waited)  # a part that has given up stays so
        better = (losses < np.array(self.best.losses)) & (waited < self._patience)
        self.best = Best(
            np.where(better, losses, self.best.losses).tolist(),
            np.where(better, step, self.best.steps).tolist(),
            np.where(better, 0, waited + 1).tolist(),
            self.best.first,
        )

        def choose(new: Any, old: Any) -> jax.Array:
            if len(better) == 1:
                return jnp.copy(new) if better[0] else old
            rows = np.pad(better, (0, len(new) - len(better)))  # experts beyond are empty
            return jnp.where(rows.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        self.params = jax.tree.map(choose, params, self.params)
