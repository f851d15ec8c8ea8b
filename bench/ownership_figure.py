"""The picture of docs/ownership.md: which parameters of a 125M model experts own, row by row.

python bench/ownership_figure.py --out docs/images/ownership.png
"""

import argparse
import dataclasses
import runpy
from pathlib import Path

import matplotlib
from flax import traverse_util

from demix_jax.config.schema import EXPERT_OWNS
from demix_jax.model.params import param_shapes

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CONFIG = Path(__file__).parent.parent / "configs" / "paper_125m.py"
BLOCKS = {  # from the input upward: beginnings of paths, and what is written there
    "embed": "embeddings (and unembedding)",
    "layers.attention": "attention and its norms, 12 layers",
    "layers.ffn.": "feed-forward, 12 layers",
    "norm": "final norm",
    "unembed": "output bias",
}
SHARED, OWNED = "#c9d3df", "#e08a3c"


def block_of(path: tuple[str, ...]) -> str:
    """Returns the key in BLOCKS of a leaf; a layer's norms stand with its attention."""
    name = ".".join(path)
    if name.startswith("layers.") and not name.startswith("layers.ffn."):
        return "layers.attention"
    return next(block for block in BLOCKS if name.startswith(block))


def sizes(row: str) -> dict[str, tuple[int, bool]]:
    """Returns numbers of each block, and True if experts own it."""
    model = runpy.run_path(str(CONFIG))["get_config"]().model
    shapes = param_shapes(dataclasses.replace(model, expert_owns=row), 1)
    found: dict[str, tuple[int, bool]] = {}
    for owned, half in enumerate(shapes):
        for path, leaf in traverse_util.flatten_dict(half).items():
            block = block_of(path)
            found[block] = (found.get(block, (0, False))[0] + leaf.size, bool(owned))
    return found


def main() -> None:
    """Draws a column for each row of the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    figure, axes = plt.subplots(figsize=(10, 4.6), layout="constrained")
    for x, row in enumerate(EXPERT_OWNS):
        found, bottom = sizes(row), 0.0
        for block, title in BLOCKS.items():
            if block not in found:
                continue
            size, owned = found[block]
            height = max(size / 1e6, 1.6)  # a norm or a bias would not be seen
            color = OWNED if owned else SHARED
            axes.bar(x, height, 0.84, bottom, color=color, edgecolor="white", linewidth=1.5)
            if height > 5:
                axes.text(x, bottom + height / 2, title.replace(", ", ",\n").replace(" (", "\n("),
                          ha="center", va="center", fontsize=8.5)  # fmt: skip
            bottom += height
        total = sum(size for size, _ in found.values())
        own = sum(size for size, owned in found.values() if owned)
        axes.text(x, bottom + 2, f"{own / 1e6:.1f} M own\n{100 * own / total:.0f} %", ha="center",
                  va="bottom", fontsize=9)  # fmt: skip
    axes.set_xticks(range(len(EXPERT_OWNS)), EXPERT_OWNS, fontsize=10)
    axes.set_ylabel("million parameters of one domain's model")
    axes.set_ylim(0, 148)
    axes.set_title(
        "model.expert_owns, 125M: what each expert owns, and what all share", fontsize=11
    )
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in (OWNED, SHARED)]
    titles = ["owned by each expert", "shared by all"]
    figure.legend(handles, titles, loc="outside lower center", ncols=2, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(given.out, dpi=130)


if __name__ == "__main__":
    main()
