"""All cells of a scale, in the order in which they are run."""

import functools
from types import ModuleType

from studies import adaptation, branching, clean_trunk, cost, domains, mixing, ownership, removal
from studies.cells import Cell, Workplace
from studies.results import Values
from studies.scales import Scale, Size
from studies.text import prepare_text

# Each has `cells(scale, size)`, `claims(results, size)` and `section(results, scale)`.
STUDIES: tuple[ModuleType, ...] = (
    domains, mixing, adaptation, removal, cost, ownership, clean_trunk, branching,
)  # fmt: skip


def grid(scale: Scale | None) -> dict[str, Cell]:
    """Returns the cells of a scale by name, the paper's plans for None.

    All cells but the first need the prepared text.
    """
    if scale is None:
        return {cell.name: cell for cell in cost.paper_cells()}
    first = Cell(f"{scale.name}.prepare", functools.partial(_prepare, scale=scale))
    found = [
        Cell(cell.name, cell.run, (first.name, *cell.needs), 100 * place + cell.order)
        for place, size in enumerate(scale.sizes)
        for study in studies_of(size)
        for cell in study.cells(scale, size)
    ]
    return {cell.name: cell for cell in (first, *sorted(found, key=lambda cell: cell.order))}


def studies_of(size: Size) -> list[ModuleType]:
    """Returns the studies that are run at a size."""
    names = {study: study.__name__.rpartition(".")[2] for study in STUDIES}
    return [study for study in STUDIES if not size.studies or names[study] in size.studies]


def _prepare(place: Workplace, *, scale: Scale) -> Values:
    return prepare_text(scale, place.data_dir, place.out)
