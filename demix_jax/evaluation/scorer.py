"""Every expert on the same text: one jitted function, vmapped over the groups of devices.

The experts that share a group of devices run one after the other, each by the same program on
arrays of the same shapes. So an expert's scores do not depend, to the last bit, on which other
experts there are (unless matrices are so small, 7 x 12, that the compiler fuses their products),
and activations of one expert at a time are in memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from demix_jax.checkpoint.checkpointer import Checkpointer
from demix_jax.checkpoint.run_dir import Run
from demix_jax.config.schema import MeshConfig, ModelConfig
from demix_jax.errors import DemixError, explain_memory
from demix_jax.model.attention import resolve_kernel
from demix_jax.model.loss import scoring_rows
from demix_jax.model.modules import Tree
from demix_jax.model.params import Params, join, param_shapes
from demix_jax.model.transformer import layer_axes, token_logprobs
from demix_jax.parallel.device_memory import check_memory
from demix_jax.parallel.mesh import make_mesh

Scorer = Callable[[Params, jax.typing.ArrayLike], jax.Array]


@functools.lru_cache(maxsize=32)  # what was compiled is used again, and JAX would never free it
def make_scorer(model: ModelConfig, mesh: Mesh, rounds: tuple[int, ...] | None = None) -> Scorer:
    """Returns `score(params, tokens)`: tokens [B, T + 1] int32 -> log-probabilities [D, B, T].

    `params` have the layout of `by_group`, placed by `scoring_sharding`. Nats, float32; entry
    [d, b, t] is expert d's log-probability of tokens[b, t + 1] given those before it. Experts stay
    on their devices of the `domain` axis and text is split over `data`, which B must be a multiple
    of; only log-probabilities leave a device. Bits stay the same on any mesh as long as B over the
    size of `data` does.

    Only the experts of `rounds`, places on the leading axis D/G, are run if they are given; D is
    then G times as many. Attention is computed by the kernel that fits these devices, whichever the
    model was trained with; xla stays xla. The same arguments give the same function.
    """
    model = dataclasses.replace(model)  # the caller's may change
    if model.attention != "xla":
        model.attention = "auto"
        model.attention = resolve_kernel(model, mesh.devices.flat[0])

    def score(params: Params, tokens: jax.Array) -> jax.Array:
        def one(expert: Tree) -> jax.Array:
            tree = join(params.shared, expert)
            return token_logprobs(model, tree, tokens[:, :-1], tokens[:, 1:])

        # One expert at once in each of the G groups, of which a device sees its own alone.
        run = jax.vmap(one, in_axes=(_group_axes(params.experts),))

        def run_round(i: jax.Array) -> jax.Array:
            return run(jax.tree.map(lambda leaf: leaf[i], params.experts))

        if rounds is None:
            logprobs = jax.lax.map(run, params.experts)  # [D/G, G, B, T]
        else:
            logprobs = jax.lax.map(run_round, jnp.array(rounds))
        return logprobs.swapaxes(0, 1).reshape(-1, *logprobs.shape[2:])

    params, text = scoring_sharding(model, mesh), NamedSharding(mesh, PartitionSpec("data"))
    local = jax.shard_map(
        score,
        mesh=mesh,
        in_specs=(jax.tree.map(lambda sharding: sharding.spec, params), text.spec),
        out_specs=PartitionSpec("domain", "data"),
        check_vma=False,  # there are no gradients, whose sums would depend on it
    )
    return jax.jit(local, in_shardings=(params, text))


def by_group(params: Params, mesh: Mesh) -> Params:
    """Arranges experts' leaves for the scorer: [D/G, L, G, ...] or [D/G, G, ...] from [D, ...].

    G is the size of the mesh's `domain` axis. Loops over experts and layers take the leading axes,
    so that no call begins with a copy of all experts. On the host this is a view.
    """

    def arrange(leaf: np.ndarray, axis: int) -> np.ndarray:
        groups = leaf.reshape(mesh.shape["domain"], -1, *leaf.shape[1:])  # [G, D/G, ...]
        return np.moveaxis(groups, 0, 1 + axis)

    experts = jax.tree.map(arrange, params.experts, _group_axes(params.experts))
    return params._replace(experts=experts)


def scoring_sharding(model: ModelConfig, mesh: Mesh) -> Params:
    """Returns the sharding of `by_group` parameters: shared everywhere, experts over `domain`."""
    params = param_shapes(model, 1)

    def stacked(axis: int) -> NamedSharding:
        return NamedSharding(mesh, PartitionSpec(*[None] * (1 + axis), "domain"))

    whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), params.shared)
    return Params(whole, jax.tree.map(stacked, _group_axes(params.experts)))


def _group_axes(experts: Tree) -> Tree:
    """Returns for each leaf of one expert the axis that G takes: behind the layers, if it has."""
    return jax.tree.map_with_path(lambda path, _: layer_axes([key.key for key in path]), experts)


class LoadedExperts:
    """Experts of a checkpoint, and its trunk, on the devices of this process, ready to score text.

    Every device works on `batch_size` sequences at a time, or, if a text has fewer, on as many as
    the next power of two. So an expert's scores are the same to the last bit whichever other
    experts are loaded, and few shapes are compiled.

    Attributes:
      run: the run.
      step: step of the checkpoint.
      names: names of the experts, in the order of the leading axis of `logprobs`.
    """

    def __init__(self, run: Run, step: int, names: Sequence[str], *, batch_size: int):
        checkpoints = Checkpointer(run.workdir)
        try:
            checkpoint = checkpoints.restore(step, run.model, experts=names)
        finally:
            checkpoints.close()
        self.run, self.step, self.names = run, step, checkpoint.experts
        mesh = make_mesh(MeshConfig(), len(self.names), jax.local_devices())
        with explain_memory(f"{len(self.names)} experts; keep fewer (top_k), or use more devices"):
            self._params = jax.device_put(
                by_group(checkpoint.state.params, mesh), scoring_sharding(run.model, mesh)
            )
        self._mesh, self._batch_size = mesh, batch_size

    def logprobs(
        self,
        tokens: np.ndarray,
        mask: np.ndarray,
        *,
        label: str,
        names: Sequence[str] = (),
    ) -> np.ndarray:
        """Returns the log-probabilities in nats of every expert on the same sequences.

        Args:
          tokens: [N, T + 1] int32.
          mask: [N, T] bool, False for tokens that are not scored: 0 in the result.
          label: name of the text in the progress bar and in errors.
          names: experts to run, in the order of the result; () means all.

        Returns:
          [D, N, T] float32.

        Raises:
          DemixError: the logits of a batch cannot fit, or an expert's log-probability is not
            finite; names the expert.
        """
        names = tuple(names or self.names)
        rows = min(self._batch_size, 1 << max(0, len(tokens) - 1).bit_length())
        model, size = self.run.model, rows * self._mesh.shape["data"]
        less = "lower --batch_size, or keep fewer experts (top_k)"
        logits = 4 * scoring_rows(model, rows) * model.vocab_size
        hidden = jnp.dtype(model.dtype).itemsize * rows * model.context * model.ffn_width
        check_memory(max(logits, hidden), f"activations of {rows:,} sequences", less)
        with explain_memory(f"{size} sequences at once; {less}"):
            scorer, chosen = self._scorer(names)
            logprobs = np.zeros((len(names), *mask.shape), np.float32)
            for i in tqdm(range(0, len(tokens), size), label, leave=False, disable=None):
                batch = tokens[i : i + size]
                padded = np.pad(batch, [(0, size - len(batch)), (0, 0)])
                scores = np.asarray(scorer(self._params, padded))[chosen, : len(batch)]
                logprobs[:, i : i + size] = np.where(mask[i : i + size], scores, 0.0)
        pairs = zip(names, logprobs, strict=True)
        broken = [name for name, scores in pairs if not np.isfinite(scores).all()]
        if broken:
            raise DemixError(
                f"{self.run.workdir} step {self.step}: log-probabilities of expert "
                f"{', '.join(broken)} on {label} are not finite; use another checkpoint"
            )
        return logprobs

    def _scorer(self, names: Sequence[str]) -> tuple[Scorer, list[int]]:
        """Returns a scorer that runs these experts, and the place of each in its result."""
        every = len(self.names) // self._mesh.shape["domain"]  # experts of a group
        places = [divmod(self.names.index(name), every) for name in names]  # group, round
        rounds = tuple(sorted({i for _, i in places}))
        some = None if len(rounds) == every else rounds
        scorer = make_scorer(self.run.model, self._mesh, some)
        return scorer, [g * len(rounds) + rounds.index(i) for g, i in places]
