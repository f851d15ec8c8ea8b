"""Lineage: the domains whose text the numbers of a checkpoint depend on, item by item.

An item depends on the text it was trained on, on all that its first numbers depended on, and, where
the trunk is trained with the experts, on the text of every expert. Under a frozen trunk an expert
depends on the trunk's text and on its own. The manifest keeps it: `trunk_lineage`, and `lineage` of
each expert's history; optimizer state depends on what its parameters do.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Self

from demix_jax.checkpoint.manifest import PARAMS, SHARED, Manifest, Provenance, item_name

Text = Mapping[str, str]  # name of a domain, by the SHA-256 of its training tokens
IMPORTED = "<imported>"  # stands for the text of a model made elsewhere, which nobody here knows


def text_of(hashes: Mapping[str, str]) -> Text:
    """Returns the text of domains, whose hashes are given by name."""
    return {value: name for name, value in hashes.items()}


def union(texts: Iterable[Text | None]) -> Text | None:
    """Returns the text of all; None if one of them is not known."""
    found: dict[str, str] = {}
    for text in texts:
        if text is None:
            return None
        found |= text
    return found


class Lineage(NamedTuple):
    """The text that a trunk and experts depend on; None where it is not known.

    Attributes:
      trunk: text of the trunk.
      experts: text of each expert, by its name.
    """

    trunk: Text | None
    experts: Mapping[str, Text | None]

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """Returns the lineage that a manifest states."""
        experts = {name: made.lineage for name, made in manifest.provenance.items()}
        return cls(manifest.trunk_lineage, experts)

    def trained(self, text: Mapping[str, Text], *, frozen: bool) -> Self:
        """Returns the lineage after training.

        Args:
          text: text that each expert was trained on, by the expert's name.
          frozen: True if the trunk was not trained.
        """
        experts = {
            name: union([self.trunk, self.experts.get(name), own]) for name, own in text.items()
        }
        if frozen:
            return self._replace(experts=experts)
        everything = union(experts.values())
        return type(self)(everything, dict.fromkeys(text, everything))

    def branched(self, names: Sequence[str]) -> Self:
        """Returns the lineage of experts that are copies of the only one."""
        (one,) = self.experts.values()
        return self._replace(experts=dict.fromkeys(names, one))


def lineage_of_items(manifest: Manifest) -> dict[str, Text | None]:
    """Returns the text of every item of parameters, by the item's name."""
    trunk = {SHARED: manifest.trunk_lineage} if manifest.trunk else {}
    return trunk | {
        item_name(PARAMS, name): manifest.provenance[name].lineage for name in manifest.experts
    }


def items_touched_by(manifest: Manifest, text: Text) -> list[str] | None:
    """Returns the items of parameters that depend on some text; None if it is not known."""
    seen = lineage_of_items(manifest)
    if None in seen.values():
        return None
    return [item for item, found in seen.items() if (found or {}).keys() & text.keys()]


def lineage_faults(manifest: Manifest, trunk: Text | None) -> list[str]:
    """Returns what is wrong with the lineage of a checkpoint.

    Args:
      manifest: manifest of the checkpoint.
      trunk: text that the run trained its trunk on; None if the run does not say.
    """
    stated, found = manifest.trunk_lineage, list[str]()
    if stated is not None and trunk is not None and manifest.trunk:
        if missing := _missing(stated, trunk):
            found.append(f"the trunk was trained on {missing}, which its lineage leaves out")
        if more := _missing(trunk, stated):
            found.append(f"the lineage of the trunk has {more}, on which it was not trained")
    for name in manifest.experts:
        found += _expert_faults(name, manifest.provenance[name], stated or {})
    return found


def _expert_faults(name: str, made: Provenance, trunk: Text) -> list[str]:
    """Returns the text that an expert must depend on, and that its lineage leaves out."""
    if made.lineage is None:
        return []
    sources = {"the trunk that it belongs to": trunk, "it": text_of(made.data)}
    return [
        f"expert {name!r}: {who} was trained on {missing}, which its lineage leaves out"
        for who, text in sources.items()
        if (missing := _missing(made.lineage, text))
    ]


def _missing(lineage: Text, text: Text) -> str:
    """Returns the domains of `text` that a lineage has not, or has with other text."""
    return ", ".join(name for value, name in text.items() if value not in lineage)
