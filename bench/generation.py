"""Speed of generation against a transformers GPT-2 of the same shape, suite `generation`.

The same number of texts goes on from prompts of the same length, with random weights, all tokens
the most probable ones: 1 to 8 live experts of ours, and transformers with its cache, by `generate`
and by a loop around the model that leaves everything else out. Each program runs in a process of
its own and waits for its turn; PyTorch's threads wait passively, for on a machine under other load
they stall each other otherwise. CPU time is that of all threads. transformers joins in if it is
installed, or if BENCH_TORCH names an interpreter that has it (`make interop` makes one).
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from bench import measure
from bench.measure import Row, Worker

SHAPES: dict[str, Row] = {
    "4 x 128": {"layers": 4, "width": 128, "heads": 4, "vocab": 4096, "context": 128}
    | {"prompt": 32, "tokens": 48},
    "6 x 512": {"layers": 6, "width": 512, "heads": 8, "vocab": 8192, "context": 256}
    | {"prompt": 32, "tokens": 48},
}
TINY: dict[str, Row] = {
    "tiny": {"layers": 2, "width": 16, "heads": 2, "vocab": 64, "context": 16}
    | {"prompt": 4, "tokens": 4},
}
EXPERTS, BATCHES = (1, 2, 4, 8), (1, 8, 32)
PEERS = ("generate", "loop")


def run(rounds: int, *, quick: bool = False) -> list[Row]:
    """Measures tokens a second for every number of experts and texts."""
    rows = []
    for name, shape in (TINY if quick else SHAPES).items():
        for batch in (1, 2) if quick else BATCHES:
            rows += _compare(name, shape | {"batch": batch}, rounds)
    return rows


def _compare(name: str, settings: Row, rounds: int) -> list[Row]:
    workers = [Worker("bench.generation", settings | {"kind": "demix"})]
    if python := _interpreter():
        settings = settings | {"kind": "transformers"}
        passive = {"OMP_WAIT_POLICY": "PASSIVE"}
        workers.append(Worker("bench.generation", settings, passive, python))
    seconds: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    for _ in range(rounds):
        for worker in workers:
            found = worker()
            for times, kind in ((seconds, "seconds"), (cpu, "cpu")):
                for label, spent in found[kind].items():
                    times.setdefault(label, []).append(spent)
    for worker in workers:
        worker.close()
    tokens = settings["batch"] * settings["tokens"]
    one = statistics.median(seconds["1"])
    rows = []
    for label, spent in seconds.items():
        median = statistics.median(spent)
        row: Row = {"shape": name, "texts": settings["batch"]}
        row["program"] = f"demix, live experts: {label}" if label.isdigit() else label
        row |= {"tokens/s": tokens / median, "ms a step": 1e3 * median / settings["tokens"]}
        row["CPU ms a step"] = 1e3 * statistics.median(cpu[label]) / settings["tokens"]
        if label.isdigit():
            row["time / (K x one)"] = median / (int(label) * one)
        if label == "1":
            for peer in PEERS:
                if times := seconds.get(f"transformers, {peer}"):
                    row[f"x {peer}"] = statistics.median(
                        theirs / ours for theirs, ours in zip(times, spent, strict=True)
                    )
        rows.append(row)
    return rows


def _interpreter() -> str:
    """Returns an interpreter that has transformers, or ""."""
    if named := os.environ.get("BENCH_TORCH"):
        return named
    import importlib.util

    return sys.executable if importlib.util.find_spec("transformers") else ""


def prepare(settings: Row) -> Callable[[int], Row]:
    """Returns the work of `measure.serve`: each way to generate, once."""
    prompts = np.random.default_rng(0).integers(
        1, settings["vocab"] - 1, (settings["batch"], settings["prompt"]), np.int32
    )
    kinds: dict[str, Any] = {"demix": _prepare_demix, "transformers": _prepare_transformers}
    calls = kinds[settings["kind"]](settings, prompts)
    for call in calls.values():  # compiles
        call()

    def work(times: int) -> Row:
        seconds, cpu = {}, {}
        for label, call in calls.items():
            start, begun = time.perf_counter(), time.process_time()
            for _ in range(times):
                call()
            seconds[label] = (time.perf_counter() - start) / times
            cpu[label] = (time.process_time() - begun) / times
        return {"seconds": seconds, "cpu": cpu}

    return work


def _prepare_demix(settings: Row, prompts: np.ndarray) -> dict[str, Callable[[], Any]]:
    import jax

    from demix_jax.config.schema import BoundModelConfig
    from demix_jax.evaluation.mixture import Mixture
    from demix_jax.generation.engine import Engine, Request
    from demix_jax.model.params import init_params
    from demix_jax.model.transformer import unstack_layers

    vocab = settings["vocab"]
    names = ("layers", "width", "heads", "context")
    model = BoundModelConfig(
        **{name: settings[name] for name in names},
        vocab_size=vocab,
        scan_unroll=settings["layers"],
        eod=vocab - 1,
        text_ids=vocab - 1,
    )
    params = jax.device_put(init_params(model, jax.random.key(0), max(EXPERTS)))
    trees = [
        unstack_layers(jax.tree.map(lambda x, i=i: x[i], params.experts))
        for i in range(max(EXPERTS))
    ]
    shared = unstack_layers(params.shared)
    slots = settings["prompt"] + settings["tokens"]

    def call(count: int) -> Callable[[], Any]:
        experts = {f"expert{i}": trees[i] for i in range(count)}
        mixture = Mixture(tuple(experts), np.full(count, 1 / count), 0.0, False, None)

        def generate() -> None:
            engine = Engine(model, shared, experts, rows=len(prompts), slots=slots)
            requests = (Request(prompt, mixture, temperature=0.0) for prompt in prompts)
            engine.admit(dict(enumerate(requests)))
            for _ in range(settings["tokens"]):
                engine.step()

        return generate

    return {str(count): call(count) for count in EXPERTS}


def _prepare_transformers(settings: Row, prompts: np.ndarray) -> dict[str, Callable[[], Any]]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = GPT2Config(
        vocab_size=settings["vocab"],
        n_positions=settings["context"],
        n_embd=settings["width"],
        n_layer=settings["layers"],
        n_head=settings["heads"],
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = GPT2LMHeadModel(config).eval()
    tokens, count = torch.from_numpy(prompts).long(), settings["tokens"]
    mask = torch.ones_like(tokens)

    @torch.inference_mode()
    def generate() -> None:
        made = model.generate(
            tokens, attention_mask=mask, max_new_tokens=count, do_sample=False, use_cache=True
        )
        assert made.shape[1] == tokens.shape[1] + count

    @torch.inference_mode()
    def loop() -> None:
        new, past = tokens, None
        for _ in range(count):
            found = model(new, cache=past, use_cache=True, logits_to_keep=1)
            new, past = found.logits[:, -1].argmax(-1, keepdim=True), found.cache

    return {"transformers, generate": generate, "transformers, loop": loop}


if __name__ == "__main__":
    measure.serve(prepare)
