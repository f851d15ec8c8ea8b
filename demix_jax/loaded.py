"""A trained model opened for inference: its newest checkpoint on devices, ready to score text."""

from collections.abc import Sequence

import jax
import numpy as np
from tqdm import tqdm

from demix_jax.checkpoint import Checkpoints, edition
from demix_jax.config import MeshConfig
from demix_jax.errors import DemixError
from demix_jax.runs import Run
from demix_jax.score import by_group, make_scorer, scoring_sharding
from demix_jax.sharding import make_mesh


class Version:
    """What a run's newest checkpoint says of itself, without reading a parameter.

    Attributes:
      step: updates done.
      experts: all its experts, in order.
      meta: all it says.
      hash: changes with any parameter of the trunk or of an expert, or with the experts' order.
    """

    def __init__(self, run: Run):
        checkpoints = Checkpoints(run.workdir)
        steps = checkpoints.steps()
        if not steps:
            raise DemixError(f"{run.workdir} has no checkpoint yet; continue `demix train`")
        self.step = steps[-1]
        meta = checkpoints.meta(self.step)
        checkpoints.close()
        self.experts: tuple[str, ...] = tuple(meta["experts"])
        self.meta, self.hash = meta, edition(meta)


class LoadedExperts:
    """The trunk and some experts of a checkpoint, on the devices of this process.

    Every device works on `batch_size` sequences at a time, so that an expert's scores are the same
    to the last bit whichever other experts are loaded.

    Attributes:
      names: the experts, in the order of the leading axis of what `logprobs` returns.
    """

    def __init__(self, run: Run, step: int, names: Sequence[str], *, batch_size: int):
        checkpoints = Checkpoints(run.workdir)
        try:
            checkpoint = checkpoints.restore(step, run.model, experts=names)
        finally:
            checkpoints.close()
        self.run, self.step, self.names = run, step, checkpoint.experts
        mesh = make_mesh(MeshConfig(), len(self.names), jax.local_devices())
        self._params = jax.device_put(
            by_group(checkpoint.state.params, mesh), scoring_sharding(mesh)
        )
        self._scorer = make_scorer(run.model, mesh)
        self._size = batch_size * mesh.shape["data"]

    def logprobs(self, tokens: np.ndarray, mask: np.ndarray, *, label: str) -> np.ndarray:
        """Log-probabilities in nats of every expert on the same sequences.

        Args:
          tokens: [N, T + 1] int32.
          mask: [N, T] bool; what is not scored is 0 in the result.
          label: of the progress bar and of errors.

        Returns:
          [D, N, T] float32.

        Raises:
          DemixError: an expert's log-probability is not finite; names the expert.
        """
        found = np.zeros((len(self.names), *mask.shape), np.float32)
        size = self._size
        for i in tqdm(range(0, len(tokens), size), label, leave=False, disable=None):
            rows = tokens[i : i + size]
            padded = np.pad(rows, [(0, size - len(rows)), (0, 0)])
            scores = np.asarray(self._scorer(self._params, padded))[:, : len(rows)]
            found[:, i : i + size] = np.where(mask[i : i + size], scores, 0.0)
        pairs = zip(self.names, found, strict=True)
        broken = [name for name, logprobs in pairs if not np.isfinite(logprobs).all()]
        if broken:
            raise DemixError(
                f"{self.run.workdir} step {self.step}: log-probabilities of expert "
                f"{', '.join(broken)} on "
                f"{label} are not finite; use another checkpoint"
            )
        return found
