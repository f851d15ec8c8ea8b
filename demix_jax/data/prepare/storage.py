"""A folder of files on a disk or in a bucket, each of which is there whole or not at all."""

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


@dataclasses.dataclass(frozen=True)
class Store:
    """The folder at `root`: a path, or an address such as `gs://bucket/folder`.

    Names are paths below it. Pickles, so that workers elsewhere write to the same place.
    """

    root: str

    @property
    def is_local(self) -> bool:
        """Whether its files can be mapped into memory."""
        return "://" not in self.root

    def below(self, name: str) -> "Store":
        """The store of a folder in this one."""
        return Store(self.place(name))

    def place(self, name: str) -> str:
        """Where `name` is."""
        return f"{self.root.rstrip('/')}/{name}"

    def exists(self, name: str) -> bool:
        """Whether there is such a file or folder."""
        return self._system.exists(self.place(name))

    def names(self, folder: str = "") -> list[str]:
        """What a folder holds, sorted; [] if there is no such folder."""
        place = self.place(folder) if folder else self.root
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = self._system.ls(place, detail=False)
            return sorted(str(path).rstrip("/").rpartition("/")[2] for path in found)
        return []

    def sizes(self, folder: str = "") -> dict[str, int]:
        """The files in a folder, with their bytes; {} if there is no such folder."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found = self._system.ls(self.place(folder) if folder else self.root, detail=True)
            files = [entry for entry in found if entry["type"] != "directory"]
            return {str(file["name"]).rpartition("/")[2]: file["size"] for file in files}
        return {}

    def read_json(self, name: str) -> dict[str, Any]:
        """The values in a file; {} if there is no such file."""
        try:
            with self._system.open(self.place(name), "rb") as file:
                return json.load(file)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise DemixError(f"{self.place(name)} is damaged: {error}; delete it") from None

    def write_json(self, name: str, values: Any) -> None:
        """Writes a file for people too, one value a line."""
        with self.writing(name) as path:
            path.write_text(json.dumps(values, indent=1) + "\n")

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A file to write, which becomes `name` when the block ends without an exception.

        Several processes may write the same name at once: one of the files is kept.
        """
        if self.is_local:
            target = Path(self.place(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            try:
                yield partial
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
            return
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder) / "file"
            self._system.put_file(str(Path(folder) / "file"), self.place(name))

    def delete(self, name: str) -> None:
        """Deletes a file, or a folder with what it holds; nothing if there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._system.rm(self.place(name), recursive=True)

    def fetch(self, name: str) -> Path:
        """A file or folder as one on this disk, copied once if it is elsewhere."""
        return Path(self.place(name)) if self.is_local else _copy(self.place(name))

    def publish(self, folder: Path, name: str) -> None:
        """Puts a folder of this disk at `name`, where there is none, and deletes it here."""
        if self.is_local:
            folder.rename(self.place(name))
        else:
            self._system.put(str(folder), self.place(name), recursive=True)
            shutil.rmtree(folder)

    @property
    def _system(self) -> Any:
        return _system(self.root)


@functools.cache
def _system(root: str) -> Any:
    try:  # others write here, so what a listing said before is not what is there now
        return fsspec.core.url_to_fs(root, use_listings_cache=False)[0]
    except (ImportError, ValueError) as error:
        raise DemixError(f"{root} cannot be opened: {error}") from None


@functools.cache
def _copy(place: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="demix-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    target = folder / place.rpartition("/")[2]
    _system(place).get(place, str(target), recursive=True)
    return target
