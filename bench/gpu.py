"""Everything about one GPU in at most nine minutes, suite `gpu`.

    python -m bench --suite gpu --rounds 3

For 125M, 350M and 760M of the paper, vocabulary 50,304, context 1,024, bfloat16: a PyTorch GPT
(flash attention, compiled, fused AdamW) against our dense step and our step with 8 experts, each in
a process of its own, one after the other, for each needs the memory. A ceiling of matrix products
is measured first. What is done is printed at once; what would begin after BENCH_SECONDS (500) is
left out and named. MFU is stated by two formulas, with N parameters without position embeddings:
6 N + 12 L E T FLOPs a token, and half of the second term, which is all that causal attention needs.
Memory is the peak that the device's allocator saw, beside what `demix plan` says. The profile
lists the operations of one step that take longest.
"""

import os
import time
from typing import Any

from bench import measure
from bench.measure import Row, Worker
from bench.train import torch_python

_COMMON: Row = {"vocab": 50_304, "context": 1024, "sequences": 32, "bf16": True, "compile": True}
SHAPES: dict[str, Row] = {
    "125M": _COMMON | {"layers": 12, "width": 768, "heads": 12},
    "350M": _COMMON | {"layers": 24, "width": 1024, "heads": 16, "sequences": 16},
    "760M": _COMMON | {"layers": 24, "width": 1536, "heads": 16, "sequences": 8},
}
TINY: dict[str, Row] = {
    "tiny": {"layers": 2, "width": 16, "heads": 2, "vocab": 64, "context": 16}
    | {"sequences": 8, "bf16": True, "compile": False},
}
_LONGEST = 90  # seconds that a program may need to be compiled and timed


def run(rounds: int, *, quick: bool = False) -> list[Row]:
    """Measures every size with every program, until the time is used up."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # of the process that plans
    end = time.monotonic() + float(os.environ.get("BENCH_SECONDS", "500"))
    ceiling = _ask("bench.gpu", {"size": 128 if quick else 8192}, 5)
    print(f"matrix products, bfloat16: {ceiling['flops'] / 1e12:.3g} TFLOP/s", flush=True)
    rows: list[Row] = []
    for name, shape in (TINY if quick else SHAPES).items():
        for label, module, more in _programs(quick):
            if not quick and time.monotonic() > end - _LONGEST:
                print(f"{name}, {label}: left out, the time is used up", flush=True)
                continue
            rows.append(_measure(name, label, module, shape | more, ceiling["flops"], rounds))
            print(measure.table([rows[-1]]), flush=True)
    for row in rows:
        theirs = [r for r in rows if r["model"] == row["model"] and r["step"] == "PyTorch"]
        if theirs and row["tokens/s"] and theirs[0]["tokens/s"]:
            row["x PyTorch"] = row["tokens/s"] / theirs[0]["tokens/s"]
    return rows


def _programs(quick: bool) -> list[tuple[str, str, Row]]:
    """Returns label, module and settings of what is compared."""
    ours: Row = {"model": {"dtype": "bfloat16"}, "profile": True}
    programs: list[tuple[str, str, Row]] = [
        ("our dense step", "bench.train", ours | {"experts": 1}),
        ("demix, 8 experts", "bench.train", ours | {"experts": 8}),
    ]
    if torch_python():
        device = "cpu" if quick else "cuda"
        programs.insert(0, ("PyTorch", "bench.peers", {"kind": "train", "device": device}))
    return programs


def _measure(name: str, label: str, module: str, settings: Row, ceiling: float, rounds: int) -> Row:
    """Returns a row of the table; one that failed says so."""
    row: Row = {"model": name, "step": label, "tokens/s": None, "x PyTorch": None}
    try:
        said = _ask(module, settings, 1 if settings["width"] < 64 else 10, rounds)
    except SystemExit as error:
        return row | {"failed": str(error)}
    tokens = settings["sequences"] * settings["context"]
    layers, width, context = settings["layers"], settings["width"], settings["context"]
    parameters = 12 * layers * width**2 + settings["vocab"] * width
    speed = tokens / said["seconds"]
    row |= {"tokens/s": speed}
    for title, attention in (("MFU", 12), ("MFU, causal", 6)):
        flops = speed * (6 * parameters + attention * layers * width * context)
        row[f"{title}, % of ceiling"] = 100 * flops / ceiling
    row["peak, GB"] = said["peak_mb"] / 1e3
    if module == "bench.train":
        row["plan, GB"] = _planned(settings) / 1e9
        print(f"{name}, {label}: longest operations\n{said.get('profile', '')}", flush=True)
    return row


def _ask(module: str, settings: Row, times: int, rounds: int = 1) -> Row:
    """Starts a worker, asks it, ends it; returns its fastest answer."""
    python = torch_python() if module == "bench.peers" else None
    worker = Worker(module, settings, **({"python": python} if python else {}))
    try:
        answers = [worker(times) for _ in range(rounds)]
        if settings.get("profile"):
            answers[0]["profile"] = worker(0)["profile"]
            return min(answers, key=lambda said: said["seconds"]) | {
                "profile": answers[0]["profile"]
            }
        return min(answers, key=lambda said: said["seconds"])
    finally:
        worker.close()


def _planned(settings: Row) -> float:
    """Returns the bytes on the device that `demix plan` predicts, for an H100 of these shapes."""
    from bench.train import model_config
    from demix_jax.config.schema import Config, TrainConfig
    from demix_jax.planning.hardware import find_hardware
    from demix_jax.planning.memory import step_memory
    from demix_jax.planning.planned_step import AbstractDevice, lay_out

    train = TrainConfig(batch_size=settings["sequences"] // 8)
    variant = "demix" if settings["experts"] > 1 else "dense_balanced"
    config = Config(model=model_config(settings), train=train, variant=variant)
    hardware = find_hardware("h100")
    return step_memory(lay_out(config, 8, [AbstractDevice(0, hardware)], hardware)).device


def prepare(settings: Row) -> Any:
    """Multiplies square matrices of bfloat16; the work of `measure.serve`."""
    import jax
    import jax.numpy as jnp

    size = settings["size"]
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda x, y: (x @ y) * jnp.bfloat16(size**-0.5))

    def work(times: int) -> Row:
        y = jax.block_until_ready(product(x, x))
        start = time.perf_counter()
        for _ in range(10 * times):
            y = product(x, y)
        jax.block_until_ready(y)
        seconds = (time.perf_counter() - start) / (10 * times)
        return {"seconds": seconds, "flops": 2 * size**3 / seconds}

    return work


if __name__ == "__main__":
    measure.serve(prepare)
