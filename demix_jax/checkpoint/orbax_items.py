"""The items of a step as Orbax writes them: trees as plain zarr arrays, and values as JSON."""

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath  # type: ignore[import-untyped]
from orbax.checkpoint import handlers
from orbax.checkpoint._src.futures import future as futures

from demix_jax.files import sync_tree
from demix_jax.model.params import Tree

Check = Callable[[Path, np.ndarray], None]  # of an array's folder, and the array in memory

_ENDS = 30  # times, a tenth of a second apart, that threads of a failed save are ended
_LOGGED_AT_EVERY_SAVE = (
    "Skipping merge of OCDBT",
    "No jax.Array in TypeHandler",
    "Global object size",
)


def item_handlers(
    check: Check, begun: threading.Event
) -> handlers.DefaultCheckpointHandlerRegistry:
    """Returns Orbax's handlers of a step's items: trees as plain arrays, and values as JSON.

    Arrays are synced and given to `check` once `begun` is set: by threads that otherwise hold up
    the one which hands the arrays over.
    """
    registry = handlers.DefaultCheckpointHandlerRegistry()
    registry.add(None, ItemSave, _array_handler(check, begun))
    registry.add(None, ValuesSave, _Values())
    return registry


def handler_names() -> tuple[str, str]:
    """Returns the names of the handlers of trees, and of JSON, by which Orbax lists items."""
    return _Items.typestr(), _Values.typestr()


def save_arrays(folder: Path, tree: Tree, check: Check) -> None:
    """Writes the arrays of an item into its folder; `check` is called with each on the disk."""
    _array_handler(check).save(epath.Path(folder), args=ItemSave(tree))


def end_waiting() -> None:
    """Ends threads of Orbax that wait for a folder which a failed save will never make.

    They would keep this process from ending for five minutes. Those that are still to begin are
    ended too; those of later saves are not.
    """
    last = int(futures.synchronization.OperationIdGenerator.get_current_operation_id())

    def end() -> None:
        for _ in range(_ENDS):
            found: Any
            for found in threading.enumerate():
                waits = isinstance(found, futures._SignalingThread)
                if waits and int(found._operation_id) <= last:
                    found.cancel()  # it returns, once it is woken
                    futures.set_signals(found._receive_signals, operation_id=found._operation_id)
            time.sleep(0.1)

    threading.Thread(target=end, daemon=True, name="end_waiting").start()


def _array_handler(
    check: Check, begun: threading.Event | None = None
) -> ocp.PyTreeCheckpointHandler:
    writer = _PlainArrays(check, begun)
    plain = ocp.type_handlers.create_type_handler_registry((np.ndarray, writer))
    return _Items(
        use_ocdbt=False,
        use_compression=False,
        type_handler_registry=plain,
        multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=None),
    )


def _is_news(record: logging.LogRecord) -> bool:
    """Returns False for what is logged at every save, and tracebacks of what is raised anyway."""
    message = record.getMessage()
    return not (record.exc_info or any(text in message for text in _LOGGED_AT_EVERY_SAVE))


for _name in ("absl", "asyncio"):  # Orbax's logger, and that of the event loops it runs
    logging.getLogger(_name).addFilter(_is_news)


class _Items(ocp.PyTreeCheckpointHandler):
    """Orbax's handler, but an item is written by the one process that has it, None on others."""

    async def async_save(self, directory: Any, args: Any) -> Any:
        return [] if args.item is None else await super().async_save(directory, args=args)


@ocp.args.register_with_handler(_Items, for_save=True)
@dataclasses.dataclass
class ItemSave(ocp.args.PyTreeSave):
    """A tree of arrays on the host, to be written as an item; None on processes without it."""

    item: Any


class _Values(ocp.JsonCheckpointHandler):
    """Orbax's handler of JSON, whose values are computed where Orbax writes: in the background."""

    async def async_save(self, directory: Any, item: Any = None, args: Any = None) -> Any:
        async def write() -> None:
            values = args.item()  # the thread is this file's own, as that of an array
            if values is not None and jax.process_index() == 0:
                (directory / "metadata").write_text(json.dumps(values))

        return [ocp.future.CommitFutureAwaitingContractedSignals(write(), name="values")]


@ocp.args.register_with_handler(_Values, for_save=True)
@dataclasses.dataclass
class ValuesSave(ocp.args.JsonSave):
    """A function of no arguments that returns JSON values; None on processes that write none."""

    item: Any


class _PlainArrays(ocp.type_handlers.NumpyHandler):
    """Writer of host arrays as plain zarr; Orbax's own writes those of process 0 only.

    What is written and synced is given to `check`, with its folder.
    """

    def __init__(self, check: Check, begun: threading.Event | None):
        super().__init__()
        self._check, self._begun = check, begun

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
        del args

        async def write(array: np.ndarray, info: Any) -> None:
            await info.await_path_creation()
            metadata = {
                "shape": array.shape,
                "chunks": array.shape,
                "dtype": array.dtype.str,
                "compressor": None,
                "order": "C",
            }
            folder = Path(info.parent_dir / info.name)
            store = {"driver": "file", "path": str(folder)}
            spec = {"driver": "zarr", "kvstore": store, "metadata": metadata}
            spec["context"] = {"file_io_sync": False}  # all at once, below
            # The thread is this array's own: waiting here needs no event loop, which Orbax closes.
            opened = tensorstore.open(spec, create=True).result()
            opened.write(array, can_reference_source_data_indefinitely=True).result()
            if self._begun:
                self._begun.wait()
            sync_tree(folder)
            self._check(folder, array)

        pairs = zip(values, infos, strict=True)
        return [
            ocp.future.CommitFutureAwaitingContractedSignals(write(value, info), name=info.name)
            for value, info in pairs
        ]
