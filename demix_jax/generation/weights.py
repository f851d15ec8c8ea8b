"""Parameters on a device for decoding: each expert and layer in arrays of its own.

They are read when they are first needed.
"""

import threading
from collections.abc import Sequence

import jax

from demix_jax.checkpoint.run_dir import CheckpointInfo
from demix_jax.model.modules import Tree
from demix_jax.model.transformer import unstack_layers


class Weights:
    """The shared parameters of a checkpoint and of those experts that were asked for.

    Attributes:
      checkpoint: the checkpoint.
      model: the one-domain model.
    """

    def __init__(self, checkpoint: CheckpointInfo):
        self.checkpoint, self.model = checkpoint, checkpoint.run.model
        self._shared: Tree = None
        self._experts: dict[str, Tree] = {}
        self._lock = threading.Lock()

    def load(self, names: Sequence[str]) -> tuple[Tree, list[Tree]]:
        """Returns the shared tree and those of experts; what is there is not copied.

        Raises:
          DemixError: no such expert, or an item that is missing, unreadable or altered.
        """
        with self._lock:
            missing = [name for name in names if name not in self._experts]
            if missing:
                checkpoint = self.checkpoint
                found = checkpoint.checkpoints.restore(checkpoint.step, self.model, None, missing)
                shared, experts = found.state.params
                for i, name in enumerate(missing):
                    one = jax.tree.map(lambda leaf, i=i: leaf[i], experts)
                    self._experts[name] = jax.device_put(unstack_layers(one))
                if self._shared is None:
                    self._shared = jax.device_put(unstack_layers(shared))
            return self._shared, [self._experts[name] for name in names]
