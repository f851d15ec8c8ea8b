"""Training state on the devices of all processes: made there, read from a checkpoint, branched.

No process has more of it on its host than the experts that its own devices hold.
"""

import functools
from collections.abc import Sequence

import jax
import optax
from jax.sharding import Mesh

from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer
from demix_jax.checkpoint.run_dir import Run
from demix_jax.model.optimizer import init_optimizer
from demix_jax.model.params import Params, TrainState, init_params, repeat_expert
from demix_jax.parallel.host_transfer import host_to_devices, local_experts
from demix_jax.parallel.layout import Layout, make_layout


class States:
    """Makes the states of one run.

    Attributes:
      run: what is trained.
      mesh: devices.
      optimizer: of each part.
    """

    def __init__(self, run: Run, mesh: Mesh, optimizer: optax.GradientTransformation):
        self.run, self.mesh, self.optimizer = run, mesh, optimizer
        self.layout = functools.cache(self._layout)

    def _layout(self, experts: int) -> Layout:
        """Of the run's model with so many experts."""
        return make_layout(self.run.config.mesh, self.mesh, self.run.model, experts)

    def fresh(self) -> TrainState:
        """A model with one feed-forward stack, from the run's seed."""
        layout, seed = self.layout(1), self.run.config.train.seed
        init = functools.partial(init_params, self.run.model, num_experts=1)
        params = jax.jit(init, out_shardings=layout.params_sharding)(jax.random.key(seed))
        return self.with_optimizer(layout, params, params)

    def with_optimizer(self, layout: Layout, params: Params, trainable: Params) -> TrainState:
        """Adds fresh optimizer state for `trainable`, the halves of `params` that are trained."""
        init = functools.partial(init_optimizer, self.optimizer)
        to = layout.optimizer_sharding(self.optimizer, trainable)
        return TrainState(params, jax.jit(init, out_shardings=to)(trainable))

    def read(
        self,
        checkpoints: Checkpointer,
        step: int,
        experts: Sequence[str],
        *,
        fresh_optimizer: bool = False,
    ) -> Checkpoint:
        """A checkpoint's experts in a given order, on the devices.

        Args:
          checkpoints: of this run or another one with the same model.
          step: one of them.
          experts: names; one may be named several times.
          fresh_optimizer: whether the optimizer's state is not read; it is then None.
        """
        layout, count = self.layout(len(experts)), len(experts)
        here = local_experts(self.mesh, count, layout.padded_experts) or (
            0,
        )  # all may be empty here
        names = [experts[i] for i in here]
        optimizer = None if fresh_optimizer else self.optimizer
        found = checkpoints.restore(step, self.run.model, optimizer, experts=names)

        def put(half: Params, shardings: Params) -> Params:
            return host_to_devices(half, here, count, layout.padded_experts, shardings)

        params = put(found.state.params, layout.params_sharding)
        opt_state, best = found.state.opt_state, found.best
        if opt_state is not None:
            trainable = Params(*(None if half is None else True for half in opt_state))
            opt_state = put(opt_state, layout.optimizer_sharding(self.optimizer, trainable))
        if best is not None:
            best = put(best, layout.params_sharding)
        return found._replace(
            state=TrainState(params, opt_state), experts=tuple(experts), best=best
        )

    def branched(self, state: TrainState, experts: int) -> TrainState:
        """Copies the one feed-forward stack, with its optimizer opt_state, to every expert."""
        layout = self.layout(experts)
        opt_state = layout.optimizer_sharding(self.optimizer, state.opt_state)
        alone, to = (
            TrainState(*(half._replace(shared=None) for half in both))
            for both in (state, TrainState(layout.params_sharding, opt_state))
        )
        copies = jax.jit(
            functools.partial(_branch, experts=layout.padded_experts), out_shardings=to
        )(alone)
        pairs = zip(copies, state, strict=True)
        return TrainState(*(copy._replace(shared=half.shared) for copy, half in pairs))


def _branch(state: TrainState, experts: int) -> TrainState:
    """Copies the one expert, with its optimizer state, `experts` times."""
    return TrainState(
        *(half._replace(experts=repeat_expert(half.experts, experts)) for half in state)
    )
