"""Finding files: by a path, a folder or a pattern, on disks and in buckets, through fsspec."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from demix_jax.data.sources.base import SPLIT_NAMES
from demix_jax.data.sources.compression import readable_errors
from demix_jax.data.sources.file_kinds import domain_of, is_hidden, is_litter
from demix_jax.errors import DemixError
from demix_jax.files import resolve_path

_BLOCK = 1 << 20
# Fields of a file's info that change with the file, the best first: a bucket's info may differ in
# other fields between two requests.
_ETAGS = ("md5Hash", "crc32c", "etag", "ETag", "mtime", "LastModified", "last_modified", "created")


class File(NamedTuple):
    """A file that was found.

    Attributes:
      place: path or URL for fsspec.
      name: path below the folder it was found in: the same on every machine.
      size: number of bytes.
      etag: text that changes when the file is written.
    """

    place: str
    name: str
    size: int
    etag: str

    @property
    def split(self) -> str | None:
        """Returns the split that its folder is named after, if any."""
        first, slash, _ = self.name.partition("/")
        return SPLIT_NAMES.get(first) if slash else None


def find_files(place: str) -> list[File]:
    """Finds the file, the files below the folder, or those of the pattern; see `list_files`."""
    return list_files(place)[0]


def list_files(place: str) -> tuple[list[File], list[str]]:
    """Finds the file, the files below the folder, or those of the pattern; sorted by name.

    Returns:
      The files, and the names of what is left out: what people and programs leave beside data
      (unless the place itself, or the last part of the pattern, is its name), files of no bytes,
      links to folders, and what is no file. Hidden files are left out, too.

    Raises:
      DemixError: the place, or what a link in it names, cannot be reached.
    """
    system, path = file_system(place)
    with readable_errors(place, "listed"):
        wildcards = [path.index(character) for character in "*?[" if character in path]
        if system.isfile(path):
            base, infos = path.rpartition("/")[0], {path: system.info(path)}
        elif system.isdir(path) or not wildcards:
            base, infos = path.rstrip("/"), system.find(path, detail=True)
        else:
            base, infos = path[: min(wildcards)].rpartition("/")[0], system.glob(path, detail=True)
        named = not any(character in path.rpartition("/")[2] for character in "*?[")
        names = {full: full[len(base) :].lstrip("/") for full in infos}
        files, left_out = [], []
        for full, name in sorted(names.items(), key=lambda item: item[1]):
            # Some buckets have an empty object `folder/` for every folder.
            if full != path and is_hidden(name):
                continue
            info = infos[full]
            if full != path and not (wildcards and named) and is_litter(name):
                left_out.append(name)
                continue
            if info.get("islink"):  # a listing describes the link
                info = system.info(full)
            if info["type"] == "file" and (full == path or info["size"] != 0 or domain_of(name)):
                files.append(_describe(system, full, name, info))
            elif not (wildcards and info["type"] == "directory" and not infos[full].get("islink")):
                left_out.append(name)
    return files, left_out


def list_folder(place: str) -> list[tuple[str, bool]]:
    """Returns sorted (name, is_folder) of a folder's entries that are not hidden.

    Raises DemixError if there is no such folder.
    """
    system, path = file_system(place)
    with readable_errors(place, "listed"):
        if not system.isdir(path):
            raise DemixError(
                f"data source {place!r} is neither 'embedded' nor a folder; "
                "name one domain as NAME=PLACE"
            )
        entries = []
        for entry in system.ls(path, detail=True):
            full = str(entry["name"]).rstrip("/")
            is_folder = system.isdir(full) if entry.get("islink") else entry["type"] == "directory"
            entries.append((full.rpartition("/")[2], is_folder))
    return sorted(entry for entry in entries if not entry[0].startswith("."))


def open_binary(place: str) -> BinaryIO:
    """Opens a file for reading; raises DemixError if it cannot be."""
    system, path = file_system(place)
    with readable_errors(place, "read"):
        return system.open(path, "rb")


def hash_contents(place: str, files: list[File]) -> list[tuple[str, int, str]]:
    """Returns name, size and SHA-256 of files; in a bucket, their etags instead."""
    if is_local(file_system(place)[0]):
        with ThreadPoolExecutor() as threads:
            hashes = list(threads.map(_hash_file, [file.place for file in files]))
    else:
        hashes = [file.etag for file in files]
    return [(f.name, f.size, value) for f, value in zip(files, hashes, strict=True)]


def _hash_file(place: str) -> str:
    digest = hashlib.sha256()
    with open_binary(place) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def file_system(place: str) -> tuple[Any, str]:
    """Returns the file system of a place, and the path in it."""
    try:
        return fsspec.core.url_to_fs(resolve_path(place))
    except (ImportError, ValueError) as error:
        raise DemixError(f"{place} cannot be opened: {error}") from None


def is_local(system: Any) -> bool:
    """Returns True for the file system of this machine."""
    return isinstance(system, LocalFileSystem)


def _describe(system: Any, full: str, name: str, info: dict[str, Any]) -> File:
    if info["size"] is None:
        raise DemixError(f"{full} does not say its size; copy it to a disk first")
    if is_local(system):  # a file's own time can be set back; when that was done cannot
        return File(full, name, info["size"], f"{info['mtime']} {info['created']}")
    etags = (str(info[key]) for key in _ETAGS if info.get(key))
    return File(system.unstrip_protocol(full), name, info["size"], next(etags, ""))


def check_unchanged(file: File) -> None:
    """Raises DemixError if a file of this disk changed since it was found and fingerprinted."""
    system, path = file_system(file.place)
    if is_local(system):
        with readable_errors(file.place, "read"):
            now = _describe(system, path, file.name, system.info(path))
        if (now.size, now.etag) != (file.size, file.etag):
            raise DemixError(f"{file.place} was written while it was read; repeat the command")
