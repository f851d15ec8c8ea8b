"""A bucket, as fsspec's file systems show one: objects that are read by ranges of bytes.

Unlike with fsspec's `memory://`, listings are cached, a file is read in blocks, and what is said of
an object is not when it was written but a tag that follows its content.
"""

import hashlib
from typing import Any, ClassVar

import fsspec
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem


class Refused(Exception):
    """What the client of a bucket raises: not an OSError."""


class _Object(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.objects[self.path][start:end]


class Bucket(AbstractFileSystem):
    """See the module's docstring."""

    protocol = "bucket"
    objects: ClassVar[dict[str, bytes]] = {}  # by path, in all instances
    sizes_known: ClassVar[bool] = True

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        path = self._strip_protocol(path)
        _check_access(path)
        found = self.dircache.get(path)
        if found is None:
            found = self._list(path)
            self.dircache[path] = found
        return found if detail else [entry["name"] for entry in found]

    def _list(self, path: str) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        prefix = f"{path}/" if path else ""
        for name, data in self.objects.items():
            below, slash, _ = name.removeprefix(prefix).partition("/")
            if name == path or (name.startswith(prefix) and not slash):
                tag = hashlib.md5(data).hexdigest()
                size = len(data) if self.sizes_known else None
                found[name] = {"name": name, "type": "file", "size": size, "ETag": tag}
            elif name.startswith(prefix):
                folder = prefix + below
                found[folder] = {"name": folder, "type": "directory", "size": 0}
        if not found:
            raise FileNotFoundError(path)
        return list(found.values())

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> _Object:
        _check_access(path)
        return _Object(self, path, mode, block_size=1 << 12, size=len(self.objects[path]))


def _check_access(path: str) -> None:
    if path.startswith("private"):
        raise Refused("no\ncredentials")


fsspec.register_implementation("bucket", Bucket, clobber=True)
