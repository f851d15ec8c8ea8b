"""The end of a checkpoint: on the disk first, then its name, then older ones go."""

from collections.abc import Callable
from pathlib import Path

from orbax.checkpoint.path import atomicity

from demix_jax.files import publish


def step_path(
    folder: Path, before: Callable[[Path], object], after: Callable[[], object]
) -> type[atomicity.AtomicRenameTemporaryPath]:
    """Returns Orbax's class of a folder that is written, whose name is on the disk with its files.

    Process 0 ends a step in the background, when all processes have written their items.

    Args:
      folder: folder of the steps.
      before: function of a step's folder, called before it gets its name; may raise.
      after: function that is called when a step has its name.
    """

    class StepPath(atomicity.AtomicRenameTemporaryPath):
        """A step, or one of its items, until it gets its name."""

        async def finalize(self) -> None:
            """Gives it its name."""
            if self._checkpoint_metadata_store:
                self._checkpoint_metadata_store.wait_until_finished()
            written, named = Path(self.get()), Path(self.get_final())
            if named.parent == folder:
                before(written)
            publish(written, named)
            if named.parent == folder:
                after()

    return StepPath
