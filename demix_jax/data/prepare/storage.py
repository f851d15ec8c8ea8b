"""Storage of files on a disk or in a bucket, each of which is there whole or not at all."""

import atexit
import contextlib
import dataclasses
import functools
import json
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from demix_jax.errors import DemixError
from demix_jax.files import make_folder, publish
from demix_jax.typed_files import parse_json, reading, seal


@dataclasses.dataclass(frozen=True)
class Store:
    """A folder: a path, or a URL such as `gs://bucket/folder`; names are paths below it.

    It can be pickled, so that workers elsewhere write to the same place.
    """

    root: str

    @property
    def is_local(self) -> bool:
        """Returns True if the files can be mapped into memory."""
        return "://" not in self.root

    def subfolder(self, name: str) -> "Store":
        """Returns the store of a folder in this one."""
        return Store(self.url(name))

    def url(self, name: str) -> str:
        """Returns the path or URL of a file or folder."""
        return f"{self.root.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        """Returns True if there is such a file or folder."""
        return self._system.exists(self.url(name))

    def names(self) -> list[str]:
        """Returns the sorted names of files and folders; [] if this folder does not exist."""
        return sorted(str(path).rstrip("/").rpartition("/")[2] for path in self._list(detail=False))

    def sizes(self) -> dict[str, int]:
        """Returns the bytes of every file; {} if this folder does not exist."""
        files = [entry for entry in self._list(detail=True) if entry["type"] != "directory"]
        return {str(file["name"]).rpartition("/")[2]: file["size"] for file in files}

    def _list(self, detail: bool) -> list[Any]:
        try:
            return self._system.ls(self.root, detail=detail)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read_json(self, name: str) -> dict[str, Any]:
        """Reads a JSON object; {} if there is no such file, DemixError if it is damaged."""
        with reading(self.url(name), "delete it"):
            try:
                return parse_json(self._system.cat_file(self.url(name)), dict[str, Any])
            except FileNotFoundError:
                return {}

    def write_json(self, name: str, values: Any) -> None:
        """Writes a JSON object with its digest, one value a line."""
        with self.writing(name) as path:
            path.write_text(json.dumps(seal(values), indent=1) + "\n")

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """Yields a file to write, which becomes `name` when the block ends without an exception.

        Several processes may write the same name at once: one of the files is kept.
        """
        if self.is_local:
            target = Path(self.url(name))
            make_folder(target.parent)
            partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            try:
                yield partial
                publish(partial, target)
            finally:
                partial.unlink(missing_ok=True)
            return
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "file"
            self._system.put_file(str(Path(folder) / "file"), self.url(name))

    def delete(self, name: str) -> None:
        """Deletes a file, or a folder with its content, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._system.rm(self.url(name), recursive=True)

    def fetch(self, name: str) -> Path:
        """Returns a file or folder on this disk, copied once if it is elsewhere."""
        return Path(self.url(name)) if self.is_local else _copy(self.url(name))

    def publish(self, folder: Path, name: str) -> None:
        """Moves a folder of this disk to `name`, which must not exist."""
        if self.is_local:
            publish(folder, Path(self.url(name)))
        else:
            self._system.put(str(folder), self.url(name), recursive=True)
            shutil.rmtree(folder)

    @property
    def _system(self) -> Any:
        return _system(self.root)


@functools.cache
def _system(root: str) -> Any:
    try:  # others write here, so no listing may be cached
        return fsspec.core.url_to_fs(root, use_listings_cache=False)[0]
    except (ImportError, ValueError) as error:
        raise DemixError(f"{root} cannot be opened: {error}") from None


@functools.cache
def _copy(url: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="demix-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = folder / url.rpartition("/")[2]
    _system(url).get(url, str(target), recursive=True)
    return target
