"""The manifest of a checkpoint: its experts, a hash of every item, and where each expert is from.

The items of a step are folders, named and taken apart here and nowhere else:

    shared     optimizer.shared    best.shared       the trunk: parameters, optimizer state, best
    expert.law optimizer.law       best.law          the same of one expert
"""

import dataclasses
import datetime
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from demix_jax.config.schema import EXPERT_OWNS, check_names, check_read_names
from demix_jax.errors import DemixError, suggest
from demix_jax.typed_files import from_json, seal, unseal

PARAMS, OPTIMIZER, BEST = KINDS = ("expert", "optimizer", "best")
SHARED = "shared"
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")  # of an item


def item_name(kind: str, expert: str | None) -> str:
    """Returns the name of the item that holds one of `KINDS` of an expert; None is the trunk."""
    if expert is None:
        return SHARED if kind == PARAMS else f"{kind}.{SHARED}"
    return f"{kind}.{expert}"


def split_item_name(item: str) -> tuple[str, str | None]:
    """Returns (kind, expert) of an item; the inverse of `item_name`."""
    kind, _, expert = item.partition(".")
    return (PARAMS, None) if item == SHARED else (kind, None if expert == SHARED else expert)


def now() -> str:
    """Returns the time in UTC, to the second, in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The history of one expert.

    Attributes:
      how: trained, adapted, copied or merged.
      parent: expert that it began as a copy of, or weights of the experts that were averaged.
      data: SHA-256 of the training tokens of each domain it was trained on.
      lineage: domain by SHA-256 of all training tokens that its numbers depend on (see
        `lineage.py`); None if they are not known.
      steps: updates done when it was saved.
      date: time in UTC.
      config: hash of the configuration it was trained with.
      formerly: names that it had before, oldest first.
    """

    how: str = "trained"
    parent: str | Mapping[str, float] | None = None
    data: Mapping[str, str] = dataclasses.field(default_factory=dict)
    steps: int | None = None
    date: str = ""
    config: str | None = None
    formerly: tuple[str, ...] = ()
    lineage: Mapping[str, str] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values, without what is not known."""
        values = vars(self) | {"formerly": list(self.formerly)}
        optional = {"config": self.config, "formerly": self.formerly}
        absent = {name for name, value in optional.items() if not value}
        absent |= {"lineage"} if self.lineage is None else set()
        return {name: value for name, value in values.items() if name not in absent}

    @property
    def parents(self) -> tuple[str, ...]:
        """Returns all experts that this one began from."""
        return (self.parent,) if isinstance(self.parent, str) else tuple(self.parent or ())

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Returns this history with parents under their new names (new by old)."""
        parent = self.parent
        if isinstance(parent, str):
            parent = names.get(parent, parent)
        elif parent:
            parent = {names.get(name, name): weight for name, weight in parent.items()}
        return dataclasses.replace(self, parent=parent)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of a checkpoint; an item that it does not list is not part of the checkpoint.

    Attributes:
      step: updates done.
      experts: names, in the order of the leading axis of the experts' parameters.
      hashes: content hash of every item, by its name.
      provenance: history of every expert, by its name.
      folders: folder of an item in the step, by the item's name, where it has another name.
      expert_owns: `model.expert_owns` of the parameters.
      trunk_lineage: domain by SHA-256 of all training tokens that the trunk's numbers depend on;
        None if they are not known.
      tokenizer: hash of the tokenizer.
      finished: no more updates are to be done.
      best: fields of `early_stopping.Best` as lists; None without early stopping.
      skipped: updates that were left out since their gradients were not finite.
      version: version of demix_jax that wrote the checkpoint.
      saved: time in UTC.
    """

    step: int = 0
    experts: tuple[str, ...] = ()
    hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    provenance: Mapping[str, Provenance] = dataclasses.field(default_factory=dict)
    folders: Mapping[str, str] = dataclasses.field(default_factory=dict)
    expert_owns: str = "ffn"
    trunk_lineage: Mapping[str, str] | None = None
    tokenizer: str = ""
    finished: bool = False
    best: Sequence[Any] | None = None
    skipped: int = 0
    version: str = ""
    saved: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns JSON values; the inverse of `from_json`."""
        values = vars(self) | {
            "experts": list(self.experts),
            "provenance": {name: made.to_json() for name, made in self.provenance.items()},
        }
        unsaid = ("folders", "skipped")  # where there are none
        return seal({k: v for k, v in values.items() if v is not None and (v or k not in unsaid)})

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Reads JSON values; raises ValueError for damaged ones."""
        made: Self = from_json(unseal(values), cls)
        lost = [name for name in made.experts if name not in made.provenance]
        items = [item_name(PARAMS, name) for name in made.experts]
        lost += [item for item in items if item not in made.hashes]
        if lost or not made.experts:
            raise ValueError(f"it says nothing of {', '.join(lost) or 'experts'}")
        check_read_names(made.experts)
        if made.expert_owns not in EXPERT_OWNS:
            raise ValueError(f"'expert_owns' is {made.expert_owns!r}")
        known = {item_name(kind, name) for kind in KINDS for name in (None, *made.experts)}
        if strange := [item for item in made.hashes if item not in known]:
            raise ValueError(f"it lists {strange[0]!r}, which is no item of its experts")
        for item, folder in made.folders.items():
            if not _FOLDER.fullmatch(folder):
                raise ValueError(f"the folder of {item!r} is {folder!r}, which is not in the step")
        return made

    @property
    def trunk(self) -> str:
        """Returns the content hash of the trunk's parameters; "" if nothing is shared."""
        return self.hashes.get(SHARED, "")

    @property
    def params_hash(self) -> str:
        """Returns a hex digest that changes with any parameter, or with the experts' order."""
        text = json.dumps([self.trunk, {name: self.expert_hash(name) for name in self.experts}])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def expert_hash(self, expert: str) -> str:
        """Returns the content hash of an expert's parameters."""
        return self.hashes[item_name(PARAMS, expert)]

    def folder_of(self, item: str) -> str:
        """Returns the name of an item's folder in the step."""
        return self.folders.get(item, item)

    def items_of(self, expert: str | None) -> dict[str, str]:
        """Returns the items by kind that hold something of an expert; None is the trunk."""
        items = {kind: item_name(kind, expert) for kind in KINDS}
        return {kind: item for kind, item in items.items() if item in self.hashes}

    def check_expert(self, name: str, where: Path | str) -> None:
        """Raises DemixError, with the nearest name, unless there is an expert of this name."""
        if name not in self.experts:
            raise DemixError(
                f"{where} has no expert {name!r}{suggest(name, self.experts)} "
                f"(experts: {', '.join(self.experts)})"
            )

    def check_new(self, *names: str) -> None:
        """Raises DemixError unless experts of these names can be added."""
        check_names(names)
        for name in names:
            if name in self.experts:
                raise DemixError(
                    f"there is an expert {name!r} already (experts: {', '.join(self.experts)}); "
                    "choose another name, or remove or rename that one"
                )

    def with_expert(
        self,
        name: str,
        hashes: Mapping[str, str],
        provenance: Provenance,
        order: Sequence[str] = (),
    ) -> Self:
        """Returns the manifest with one more expert, whose items have `hashes` by kind.

        It is the last one, or takes its place in `order` if the others have theirs. Raises
        DemixError if the name is taken or unfit.
        """
        self.check_new(name)
        experts = (*self.experts, name)
        known = tuple(expert for expert in order if expert in self.experts)
        if name in order and known == self.experts:
            experts = tuple(expert for expert in order if expert in experts)
        items = {item_name(kind, name): value for kind, value in hashes.items()}
        return dataclasses.replace(
            self,
            experts=experts,
            hashes={**self.hashes, **items},
            provenance={**self.provenance, name: provenance},
        )

    def without(self, names: Iterable[str]) -> Self:
        """Returns the manifest without some experts.

        Raises:
          DemixError: no such expert, one that is named twice, or none would stay.
        """
        gone = tuple(names)
        for name in gone:
            self.check_expert(name, "the checkpoint")
        check_names(gone)
        if not set(self.experts) - set(gone):
            raise DemixError(
                f"cannot remove {', '.join(gone)}: no expert would be left; a model needs one"
            )
        items = {item for name in gone for item in self.items_of(name).values()}
        return dataclasses.replace(
            self,
            experts=tuple(name for name in self.experts if name not in gone),
            hashes={item: value for item, value in self.hashes.items() if item not in items},
            folders={item: name for item, name in self.folders.items() if item not in items},
            provenance={n: made for n, made in self.provenance.items() if n not in gone},
        )

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Returns the manifest with experts under other names (new by old), also as parents.

        Raises:
          DemixError: no such expert, or a new name that is taken, unfit or given twice.
        """
        items = self.renamed_items(names)
        history = {}
        for name, made in self.provenance.items():
            made = made.renamed(names)
            if name in names:
                made = dataclasses.replace(made, formerly=(*made.formerly, name))
            history[names.get(name, name)] = made
        return dataclasses.replace(
            self,
            experts=tuple(names.get(name, name) for name in self.experts),
            hashes={items.get(item, item): value for item, value in self.hashes.items()},
            folders={item: name for item, name in self.folders.items() if item not in items},
            provenance=history,
        )

    def renamed_items(self, names: Mapping[str, str]) -> dict[str, str]:
        """Returns the new names of items by their old names; raises what `renamed` raises."""
        for old in names:
            self.check_expert(old, "the checkpoint")
        self.check_new(*names.values())
        kinds = [(old, kind, item) for old in names for kind, item in self.items_of(old).items()]
        return {item: item_name(kind, names[old]) for old, kind, item in kinds}

    def descendants(self, name: str) -> list[str]:
        """Returns the experts that began from `name`, directly or not; also by averaging."""
        heirs: list[str] = []
        ancestors = [name]
        while ancestors:
            ancestor = ancestors.pop()
            for expert, made in self.provenance.items():
                if ancestor in made.parents and expert not in (name, *heirs):
                    heirs.append(expert)
                    ancestors.append(expert)
        return heirs
