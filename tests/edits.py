"""Runs to be edited in tests: made by hand, without training, and looked at from outside."""

import functools
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
import tiny

from demix_jax.checkpoint.checkpointer import Checkpoint, Checkpointer
from demix_jax.checkpoint.manifest import Manifest, Provenance
from demix_jax.checkpoint.run_dir import Run, load_run, write_run
from demix_jax.config.serialization import config_hash
from demix_jax.data.tokenizers import load_tokenizer
from demix_jax.errors import DemixError
from demix_jax.evaluation.scorer import LoadedExperts
from demix_jax.experts.lifecycle import (
    add_experts,
    import_experts,
    merge_experts,
    remove_experts,
    rename_experts,
)
from demix_jax.experts.widen import widen_experts
from demix_jax.model.optimizer import init_optimizer, make_optimizer
from demix_jax.model.params import Params, TrainState, param_shapes

EXPERTS = ("law", "med", "code", "news")
STEP = 6
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")


def make_run(
    folder: Path,
    experts: Sequence[str] = EXPERTS,
    *,
    steps: Sequence[int] = (STEP,),
    trunk: int = 0,
    seed: int = 0,
    best: bool = False,
    variant: str = "demix",
    expert_owns: str = "ffn",
    frozen: bool = False,
    context: int = 16,
) -> Path:
    """Writes a run of random numbers in `folder`, with its data beside it; returns `folder`.

    Args:
      folder: of the run.
      experts: names.
      steps: of its checkpoints; each has other numbers.
      trunk: seed of the trunk of the newest step.
      seed: of the experts.
      best: with the best parameters so far, as runs that stop early have them.
      variant: of the run.
      expert_owns: row of the split table.
      frozen: whether the trunk has no optimizer state.
      context: of the model.
    """
    data = tiny.write_prepared(folder.parent / f"{folder.name}-data", EXPERTS, ("chat",), 8)
    config = tiny.config(data, variant)
    config.model.expert_owns, config.model.context = expert_owns, context
    text = {name: hashlib.sha256(name.encode()).hexdigest() for name in experts}
    write_run(Run(folder, config, tuple(experts), load_tokenizer(data / "tokenizer"), text), data)
    run = load_run(folder)
    checkpoints = Checkpointer(folder, keep=len(steps))
    optimizer = make_optimizer(config.optim, config.train.steps)
    params = param_shapes(run.model, len(experts))
    moments = jax.eval_shape(functools.partial(init_optimizer, optimizer), params)
    state = TrainState(params, moments)
    for step in steps:
        shared, own = (np.random.default_rng([s, STEP - step]) for s in (trunk, seed + 100))
        halves = [_random(half.shared, shared) for half in state]
        stacks = [_random(half.experts, own) for half in state]
        params, moments = (Params(*pair) for pair in zip(halves, stacks, strict=True))
        moments = moments._replace(shared=None) if frozen else moments
        provenance = {
            name: Provenance("trained", "dense", {name: text.get(name, "-")}, step,
                             "2026-11-23T12:00:00+00:00", config_hash(config))
            for name in experts
        }  # fmt: skip
        checkpoints.save(
            Checkpoint(
                step,
                TrainState(params, moments),
                tuple(experts),
                Manifest(
                    tokenizer=run.tokenizer.hash,
                    provenance=provenance,
                    expert_owns=expert_owns,
                    hashes={"shared": "-"} if frozen else {},
                ),
                jax.tree.map(lambda x: x + x, params) if best else None,
            )
        )
    checkpoints.close()
    return folder


def step_of(workdir: Path, step: int = STEP) -> Path:
    return workdir / "checkpoints" / str(step)


def meta_of(workdir: Path, step: int = STEP) -> dict:
    return json.loads((step_of(workdir, step) / "meta" / "metadata").read_text())


def files(folder: Path) -> dict[str, tuple[int, str]]:
    """Inode and SHA-256 of every file below a folder, but for the lock."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, _sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def contents(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, but for the lock."""
    return {name: digest for name, (_, digest) in files(folder).items()}


def numbers(workdir: Path, step: int = STEP) -> dict[str, str]:
    """SHA-256 of the files of a step that hold numbers or say what it holds."""
    found = contents(step_of(workdir, step))
    return {n: d for n, d in found.items() if n.count("/") == 2 or n == "meta/metadata"}


def items(workdir: Path, step: int = STEP) -> set[str]:
    """The folders of a step."""
    return {path.name for path in step_of(workdir, step).iterdir() if path.is_dir()}


def array(workdir: Path, item: str, leaf: str = "layers.ffn.up.kernel") -> np.ndarray:
    """The float32 numbers of an array, from its one file, which is not compressed."""
    (path,) = (p for p in (step_of(workdir) / item / leaf).iterdir() if p.name != ".zarray")
    return np.frombuffer(path.read_bytes(), "<f4")


def damage(workdir: Path, item: str, how: str) -> None:
    """Makes an item truncated, altered (one bit), without an array, or missing."""
    folder = step_of(workdir) / item
    leaf = next(path for path in sorted(folder.iterdir()) if path.name.endswith("up.kernel"))
    file = next(path for path in leaf.iterdir() if path.name != ".zarray")
    if how == "missing":
        shutil.rmtree(folder)
    elif how == "without an array":
        shutil.rmtree(leaf)
    elif how == "truncated":
        os.truncate(file, file.stat().st_size // 2)
    else:
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)


def restored(workdir: Path) -> Checkpoint:
    """The newest checkpoint, read completely, every item against its hash."""
    newest = load_run(workdir).latest()
    config, optimizer = newest.run.config, None
    if all("optimizer" in newest.manifest.items_of(name) for name in newest.experts):
        optimizer = make_optimizer(config.optim, config.train.steps)
    return newest.checkpoints.restore(newest.step, newest.run.model, optimizer)


def scores(workdir: Path, batch_size: int = 4) -> dict[str, bytes]:
    """Log-probabilities of random text under each expert of the newest checkpoint, as bytes."""
    run = load_run(workdir)
    tokens = np.random.default_rng(5).integers(0, 257, (9, 17)).astype(np.int32)
    loaded = LoadedExperts(run, run.latest().step, (), batch_size=batch_size)
    found = loaded.logprobs(tokens, np.ones((9, 16), bool), label="random text")
    assert np.isfinite(found).all()
    return {name: row.tobytes() for name, row in zip(loaded.names, found, strict=True)}


def _random(tree, rng: np.random.Generator):
    def fill(leaf):
        if not np.issubdtype(leaf.dtype, np.floating):
            return np.full(leaf.shape, 6, leaf.dtype)
        return (rng.normal(size=leaf.shape) * 0.2).astype(leaf.dtype)

    return jax.tree.map(fill, tree)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


COMMANDS: dict[str, Callable[[Path], object]] = {
    "add": lambda workdir: add_experts(workdir, ["copy"], ["law"]),
    "merge": lambda workdir: merge_experts(workdir, "mix", {"law": 0.25, "med": 0.75}),
    "import": lambda workdir: import_experts(workdir, [workdir.parent / "chat.safetensors"]),
    "rename": lambda workdir: rename_experts(workdir, {"law": "acts"}),
    "remove": lambda workdir: remove_experts(workdir, ["med"]),
    "widen": lambda workdir: widen_experts(workdir, "ffn+bias"),
    "purge": lambda workdir: remove_experts(workdir, ["med"], purge_history=True),
}


def killed_everywhere(command: str, base: Path, folder: Path, every: int, thin: int = 1) -> None:
    """Runs a command on copies of a run, `folder`/<n>, each killed before its n-th change.

    n is 1, 2 and so on until a run gets to its end, `folder`/whole; while the files of an item are
    written, copied or deleted, only the first two and each `every`-th; and of all these, each
    `thin`-th. To be called where JAX has not started, since it forks.
    """
    changes = _forked(command, base, folder / "whole", 0)
    points = []
    for n in range(1, len(changes) + 1):
        last = changes[max(n - 3, 0) : n]
        if n % every == 0 or len(set(last)) > 1 or last[0] not in ("copy", "delete"):
            points.append(n)
    for n in points[::thin]:
        _forked(command, base, folder / str(n), n)


def with_full_disk(command: str, base: Path, folder: Path, sizes: Sequence[int]) -> list[int]:
    """Runs a command on copies of a run, `folder`/<size>, where no file can grow beyond a size.

    Returns:
      The exit status of each: 0, 3 for an error that says what is wrong, 1 for any other.
    """
    return [_limited(command, base, folder / str(size), size) for size in sizes]


def _forked(command: str, base: Path, workdir: Path, kill_at: int) -> list[str]:
    """Runs a command in a child, killed before its `kill_at`-th change; the changes."""
    shutil.copytree(base, workdir)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the child ends)
        count = 0

        def see(event: str, args: tuple) -> None:
            nonlocal count
            if event in CHANGES or (event == "open" and isinstance(args[2], int) and args[2] & 3):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                os.write(write, f"{_change(event, str(args[0]))}\n".encode())

        sys.addaudithook(see)
        try:
            COMMANDS[command](workdir)
        finally:
            os._exit(sys.exc_info()[0] is not None)
    os.close(write)
    with open(read) as log:
        changes = log.read().splitlines()
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert killed if kill_at else status == 0, (command, kill_at, status)
    return changes


def _change(event: str, path: str) -> str:
    if event == "os.link" or ".partial/" in path:
        return "copy"
    deletes = event in ("os.remove", "os.rmdir") and not path.startswith("/")  # as rmtree does
    return "delete" if deletes else f"{event} {path}"


def _limited(command: str, base: Path, workdir: Path, size: int) -> int:
    shutil.copytree(base, workdir)
    child = os.fork()
    if not child:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the child ends)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        status = 1
        try:
            COMMANDS[command](workdir)
            status = 0
        except (DemixError, OSError) as error:
            status = 3 if "\n" not in str(error) else 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
