"""Pictures of the page, from the results alone."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from studies.adaptation import DENSE, adapt_cell, adapted_rows
from studies.domains import AGAINST, against, train_cell
from studies.mixing import RATES
from studies.page_parts import TITLES
from studies.results import Results, difference, macro
from studies.scales import ROWS, Scale, Size

Drawing = Callable[[Any, Results, Size], None]  # draws into axes
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#666666")


def pictures(results: Results, scale: Scale) -> Iterator[tuple[str, str, Size, Drawing]]:
    """Yields file name, title, size and function of every picture that there are results for.

    The file is named after the size and the study.
    """
    for size in scale.sizes:
        train = [name for name in TITLES if results.seeds(train_cell(size, name))]
        adapted = DENSE in adapted_rows(results, size)
        swept = results.seeds(f"{size.name}.mixing.s{{seed}}", train_cell(size, AGAINST))
        for name, title, function, drawn in (
            ("domains", "training domains, by variant", _domains, AGAINST in train and train[1:]),
            ("mixing", "mixtures, by the switch rate", _mixing, swept),
            ("adaptation", "adaptation, by update", _adaptation, adapted),
        ):
            if drawn:
                yield f"replication-{size.name}-{name}.png", f"{size.name}: {title}", size, function


def draw(results: Results, scale: Scale, folder: Path) -> int:
    """Writes every picture that there are results for; returns their number."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for file, _, size, function in pictures(results, scale):
        figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
        function(axes, results, size)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.savefig(folder / file, dpi=110, metadata={"Software": None})
        plt.close(figure)
        count += 1
    return count


def _domains(axes: Any, results: Results, size: Size) -> None:
    train = tuple(results.prepared["train"])
    rows = []
    for variant in TITLES:
        gap = against(results, size, variant, train)
        if gap.numbers and variant != AGAINST:
            rows.append((TITLES[variant].replace("`", ""), gap))
    for i, (_, gap) in enumerate(rows):
        axes.errorbar(gap.mean, -i, xerr=gap.error or 0, fmt="o", color=COLORS[0], capsize=4)
        axes.plot(gap.numbers, [-i + 0.2] * len(gap.numbers), "|", color=COLORS[6], markersize=7)
    axes.axvline(0, color="#888888", linewidth=1)
    axes.set_yticks([-i for i in range(len(rows))], [title for title, _ in rows])
    axes.set_xlabel("nats/token against dense, balanced (own expert; lower is better)")
    axes.set_title(
        f"{size.name}: training domains; mean, standard error and each seed", fontsize=10
    )


def _mixing(axes: Any, results: Results, size: Size) -> None:
    prepared = results.prepared
    sweep, base = f"{size.name}.mixing.s{{seed}}", train_cell(size, "branched")
    rates = ("0", *RATES)
    for i, (half, mode) in enumerate(
        (half, mode) for half in ("train", "novel") for mode in ("uniform", "cached")
    ):
        domains = tuple(prepared[half])
        gaps = [
            results.over_seeds(
                lambda one, other, swept, setting=f"{mode}, s={rate}", domains=domains: difference(
                    macro(one, setting, domains), macro(other, "known", domains)
                ),
                sweep if rate in RATES else base,
                train_cell(size, AGAINST),
                sweep,  # the seeds that have one
            )
            for rate in rates
        ]
        axes.errorbar(
            range(len(rates)),
            [gap.mean for gap in gaps],
            yerr=[gap.error or 0 for gap in gaps],
            color=COLORS[i % 2],
            linestyle="-" if half == "train" else "--",
            marker="o" if half == "train" else "^",
            capsize=3,
            label=f"{mode} prior, {'training' if half == 'train' else 'novel'} domains",
        )
    axes.axhline(0, color="#888888", linewidth=1)
    axes.set_xticks(range(len(rates)), rates)
    axes.set_xlabel("switch rate s (0: the paper's rule; 1: fixed weights)")
    axes.set_ylabel("nats/token against dense, balanced")
    count = len(results.seeds(sweep, train_cell(size, AGAINST)))
    bars = f"mean and standard error of {count} seeds" if count > 1 else "one seed"
    axes.set_title(f"{size.name}: mixtures of branched experts; {bars}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _adaptation(axes: Any, results: Results, size: Size) -> None:
    """Draws losses less the last one of dense DAPT of the same seed: seeds differ by more."""
    dense = adapt_cell(size, DENSE)
    for i, row in enumerate(adapted_rows(results, size)):
        cell = adapt_cell(size, row)
        if not (seeds := results.seeds(cell, dense)):
            continue
        # [seeds, domains, validations, 2]: the step and the loss
        ours, theirs = (
            np.array([list(results.values(c.format(seed=s))["curves"].values()) for s in seeds])
            for c in (cell, dense)
        )
        steps = ours[0, 0, :, 0]
        gaps = ours[..., 1].mean(1) - theirs[:, :, -1:, 1].mean(1)
        title = "dense DAPT (forgets)" if row == DENSE else f"experts own {ROWS[row]}"
        axes.plot(steps, gaps.mean(0), color=COLORS[i], marker="o", markersize=3, label=title)
        axes.fill_between(steps, gaps.min(0), gaps.max(0), color=COLORS[i], alpha=0.15)
    axes.axhline(0, color="#888888", linewidth=1)
    axes.set_xlabel("update")
    axes.set_ylabel(
        "validation nats/token, mean of the new domains,\nagainst the end of dense DAPT"
    )
    axes.set_title(f"{size.name}: adaptation; mean, lowest and highest seed", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
