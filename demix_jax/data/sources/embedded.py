"""The embedded corpus: sixteen domains of real text from the files of installed packages.

The text is read, at run time, from the files of Python distributions that this library needs
anyway and of small ones of the extra `corpus`, so nothing is downloaded or shipped. Nothing is
imported from them either: only their lists of files are consulted.

Trained on, with MB of text (2.5 is the cap):

    python     2.5  library code of JAX, Flax, Optax and Orbax, docstrings taken out
    docs       2.5  docstrings of NumPy and SciPy: English in numpydoc form
    stubs      2.5  type stubs (.pyi) of typeshed
    cpp        2.5  C++ of pybind11, nanobind, NumPy and jaxlib
    legal      1.7  licences of software: legal English
    music      2.5  folk tunes in ABC notation, some with their words
    romance    1.0  messages of programs in Spanish, French, Portuguese and Romanian
    slavic     1.1  the same in Russian, Bulgarian, Serbian, Czech, Polish, Slovak and Slovenian

Novel, met only at test time, each akin to some of the above:

    cython     1.1  Cython sources (python, stubs)
    c          1.1  the C code that Cython puts into what it compiles (cpp)
    tests      2.5  unit tests of NumPy and SciPy (python)
    lexers     2.3  grammars of Pygments: Python made of regular expressions (python)
    readme     0.7  package descriptions in Markdown and reStructuredText (docs)
    kern       2.5  masses of Palestrina in Humdrum's **kern notation (music)
    italian    0.6  messages of programs in Italian, Catalan and Galician (romance)
    germanic   0.8  the same in German, Dutch, Danish, Norwegian and Swedish (romance, docs)

One file may fill several documents; all of them are in one split. Domains that come from few files
are split by section instead.
"""

import ast
import email
import hashlib
import inspect
import platform
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TypeGuard

from demix_jax.data.sources.base import Document
from demix_jax.errors import DemixError

MAX_BYTES = 2_500_000  # of UTF-8, in one domain
MAX_PIECE = 20_000  # characters in one document
MAX_SECTION = 4_000  # the same where sections, not files, are split
MIN_PIECE = 200

_FORMAT = 2  # part of every fingerprint: raise it when the same files would give other text
_MAX_LINE = 2_000  # a file with a longer line was written by a machine for a machine
_LONG_LINE = 30  # shorter lines ("return None") recur in any text and prove no copying
_MIN_PART = 120  # characters of a string or comment worth taking out of its code


def read_domain(name: str) -> Iterator[Document]:
    """Yields the documents of a domain, always in the same order.

    Files come in the order of a hash of their paths, so that a domain larger than `MAX_BYTES` is
    sampled evenly. Copies of earlier documents are left out.
    """
    domain = _domain(name)
    limit = MAX_SECTION if domain.by_section else MAX_PIECE
    copies = _Copies()
    total = 0
    for path, text in _texts(domain, name):
        used = 0
        for number, piece in enumerate(_pieces(text, limit)):
            if len(piece) < MIN_PIECE or copies.holds(piece):
                continue
            used += len(piece.encode())
            if used > domain.max_file_bytes:
                break
            total += len(piece.encode())
            if total > MAX_BYTES:
                return
            document_id = f"{path}#{number}"
            yield Document(piece, document_id, _split(document_id if domain.by_section else path))


def fingerprint(name: str) -> str:
    """Returns a digest that changes whenever the text of `read_domain` might."""
    domain = _domain(name)
    origins = [source.origin(name) for source in domain.sources]
    limits = (MAX_BYTES, MAX_PIECE, MAX_SECTION, MIN_PIECE, domain.max_file_bytes)
    # Wheels differ between machines, and the parser between versions of Python.
    host = (sys.platform, platform.machine(), sys.version_info[:2])
    return _sha256(repr((_FORMAT, limits, domain.by_section, host, origins)))[:16]


@dataclass(frozen=True)
class _Files:
    """Files of installed distributions; names and patterns are separated by spaces."""

    distributions: str
    include: str
    exclude: str = ""
    extract: Callable[[str], str] = lambda text: text

    def origin(self, domain: str) -> tuple[str, ...]:
        """Returns versions of the distributions, patterns and the name of the extractor."""
        versions = [f"{d.name}=={d.version}" for d in self._installed(domain)]
        return (*versions, self.include, self.exclude, self.extract.__name__)

    def texts(self, domain: str) -> list[tuple[str, Callable[[], str]]]:
        """Returns paths of the files, each with a function that reads the text."""
        files = {f.as_posix(): f for d in self._installed(domain) for f in _listing(d)}
        return [
            (path, partial(self._text, file))
            for path, file in files.items()
            if _matches(path, self.include) and not _matches(path, self.exclude)
        ]

    def _installed(self, domain: str) -> list[metadata.Distribution]:
        return [_distribution(name, domain) for name in self.distributions.split()]

    def _text(self, file: metadata.PackagePath) -> str:
        try:
            return self.extract(Path(str(file.locate())).read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            return ""


class _Domain:
    """The collections of texts of one domain, and how they are split.

    Attributes:
        sources: collections of its texts.
        by_section: True if the sections of a file may be in different splits.
        max_file_bytes: largest number of bytes taken from one file, so that none dominates.
    """

    def __init__(
        self, *sources: _Files, by_section: bool = False, max_file_bytes: int = 40_000
    ) -> None:
        self.sources = sources
        self.by_section = by_section
        self.max_file_bytes = max_file_bytes


class _Copies:
    """The documents seen so far, to recognise those that mostly repeat earlier ones."""

    def __init__(self) -> None:
        self._lines: set[str] = set()
        self._texts: set[str] = set()

    def holds(self, text: str) -> bool:
        """Returns True if `text` repeats documents seen before; if not, adds it to them."""
        key = " ".join(text.split())
        lines = [line for raw in text.split("\n") if len(line := raw.strip()) >= _LONG_LINE]
        seen = sum(line in self._lines for line in lines)
        if key in self._texts or 2 * seen > len(lines):
            return True
        self._texts.add(key)
        self._lines.update(lines)
        return False


def _domain(name: str) -> _Domain:
    if name not in _DOMAINS:
        known = ", ".join(_DOMAINS)
        raise DemixError(f"the embedded corpus has no domain {name!r}; it has {known}")
    return _DOMAINS[name]


def _distribution(name: str, domain: str) -> metadata.Distribution:
    try:
        return metadata.distribution(name)
    except metadata.PackageNotFoundError:
        raise DemixError(
            f"domain {domain!r} of the embedded corpus is read from the files of {name!r}, "
            f"which is not installed; pip install {name}, or 'demix_jax[corpus]' for all"
        ) from None


def _listing(distribution: metadata.Distribution) -> list[metadata.PackagePath]:
    files = distribution.files  # read anew at each access
    if files is None:
        raise DemixError(f"{distribution.name!r} has no list of its files; install it with pip")
    return files


def _texts(domain: _Domain, name: str) -> Iterator[tuple[str, str]]:
    """Yields paths with texts, in the order of the hash of the path."""
    readers = dict(pair for source in domain.sources for pair in source.texts(name))
    for path in sorted(readers, key=_sha256):
        text = readers[path]()
        if max(map(len, text.split("\n"))) <= _MAX_LINE:
            yield path, text


def _pieces(text: str, limit: int) -> Iterator[str]:
    """Splits a text before empty lines, or else at ends of lines."""
    while len(text) > limit:
        cut = text.rfind("\n\n", limit // 2, limit)
        if cut < 0:
            cut = text.rfind("\n", 0, limit)
        yield text[:cut].strip("\n")
        text = text[cut + 1 :]
    yield text.strip("\n")


def _split(identity: str) -> str:
    """Returns the split of a file: 80 % train, 10 % valid, 10 % test."""
    tenth = int(_sha256(f"split:{identity}")[:8], 16) % 10
    return {8: "valid", 9: "test"}.get(tenth, "train")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _matches(path: str, patterns: str) -> bool:
    """Returns True if a path has one of the patterns, in which `*` matches `/` too."""
    return any(fnmatchcase(path, pattern) for pattern in patterns.split())


_OPENING_COMMENTS = re.compile(r"\A(?:\s*(?:#(?![a-z])[^\n]*\n|//[^\n]*\n|/\*.*?\*/))+", re.DOTALL)
_LEGAL = re.compile(r"copyright|licen[cs]e", re.IGNORECASE)
_CREDITS = re.compile(r"^[NORZ]:.*\n", re.MULTILINE)
_NO_NOTES = re.compile(r"^[!*].*\n", re.MULTILINE)
_MESSAGE = re.compile(r'^msgstr(?:\[\d\])? ((?:"(?:[^"\\\n]|\\.)*"\s*)+)', re.MULTILINE)


def _without_licence(text: str) -> str:
    """Removes the comment at the head of a file if it is a licence: all share a few."""
    opening = _OPENING_COMMENTS.match(text)
    return text[opening.end() :] if opening and _LEGAL.search(opening[0]) else text


def _without_docstrings(text: str) -> str:
    """Returns Python code without its docstrings."""
    lines = text.split("\n")
    for literal in reversed(_docstring_literals(_parse(text))):
        del lines[literal.lineno - 1 : literal.end_lineno]
    return _without_licence("\n".join(lines))


def _docstrings(text: str) -> str:
    """Returns the docstrings of some length in Python code."""
    return _join(inspect.cleandoc(str(x.value)) for x in _docstring_literals(_parse(text)))


def _without_credits(text: str) -> str:
    """Returns tunes in ABC notation without who wrote them down, where, and of which kind."""
    return _CREDITS.sub("", text)


def _notes(text: str) -> str:
    """Returns the notes of a score in Humdrum's **kern, without clefs, names and remarks."""
    return _NO_NOTES.sub("", text)


def _translations(text: str) -> str:
    """Returns the translated messages of a gettext catalogue, without its header."""
    messages = [ast.literal_eval(f"({block})") for block in _MESSAGE.findall(text)]
    lines = (line for message in messages[1:] for line in message.split("\n"))
    return "\n".join(line for line in lines if len(line) <= _MAX_LINE)


def _description(text: str) -> str:
    """Returns the package description that follows the fields of a METADATA file."""
    return str(email.message_from_string(text).get_payload())


def _join(parts: Iterable[str]) -> str:
    """Joins those of the texts that are long enough to be prose, an empty line between them."""
    return "\n\n".join(part for part in parts if len(part) >= _MIN_PART)


def _parse(text: str) -> ast.Module:
    """Parses Python code; code that is not Python 3 is taken for an empty file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes are the concern of others
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError):
            return ast.Module(body=[], type_ignores=[])


def _docstring_literals(tree: ast.Module) -> list[ast.Constant]:
    """Returns the docstrings in a module, in the order of their lines."""
    scopes = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    bodies = [node.body for node in _statements(tree) if isinstance(node, scopes)]
    return [
        body[0].value
        for body in bodies
        if body and isinstance(body[0], ast.Expr) and _is_string(body[0].value)
    ]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yields a node and the statements within, in a quarter of the time of `ast.walk`."""
    yield node
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, block, ()):
            yield from _statements(child)


def _is_string(node: ast.AST) -> TypeGuard[ast.Constant]:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


_DESCRIBED = """
    absl-py aiofiles anyio array-record asgiref chardet charset-normalizer cython django etils
    filelock flax fonttools fsspec grain h11 huggingface-hub humanize idna jax jaxlib jedi joblib
    jsonpickle kiwisolver markdown-it-py matplotlib ml-collections ml-dtypes more-itertools
    msgpack music21 nanobind numpy opt-einsum optax orbax-checkpoint packaging parso pillow
    plone.app.locales prometheus-client protobuf psutil pybind11 pygments pyyaml requests rich
    safetensors scipy sentencepiece simplejson spdx sqlparse tensorboardx tensorstore tokenizers
    tqdm treescope typing-extensions urllib3 uvloop webcolors zipp zstandard
"""


def _messages(*languages: str) -> _Domain:
    """Returns the domain of what Django and Plone say in some languages."""
    include = " ".join(f"*/{language}/LC_MESSAGES/*.po" for language in languages)
    files = _Files("django plone.app.locales", include, extract=_translations)
    return _Domain(files, by_section=True, max_file_bytes=MAX_BYTES)


_TRAIN = {
    "python": _Domain(
        _Files(
            "jax flax optax orbax-checkpoint",
            "*.py",
            exclude="*_test.py */tests/* *_pb2.py",
            extract=_without_docstrings,
        )
    ),
    "docs": _Domain(_Files("numpy scipy", "*.py", exclude="*/tests/*", extract=_docstrings)),
    "stubs": _Domain(_Files("jedi", "*.pyi", extract=_without_licence), max_file_bytes=150_000),
    "cpp": _Domain(
        _Files("jaxlib nanobind numpy pybind11", "*.h *.cpp *.hpp", extract=_without_licence),
        max_file_bytes=150_000,
    ),
    "legal": _Domain(_Files("spdx", "*.txt")),
    "music": _Domain(
        _Files("music21", "*.abc", extract=_without_credits),
        by_section=True,
        max_file_bytes=150_000,
    ),
    "romance": _messages("es", "fr", "pt", "pt_BR", "ro"),
    "slavic": _messages("bg", "cs", "pl", "ru", "sk", "sl", "sr"),
}
_NOVEL = {
    "cython": _Domain(
        _Files(
            "cython numpy scipy uvloop",
            "*.pyx *.pxd *.pxi",
            exclude="*/cython_blas.* */cython_lapack.* */_ufuncs*",  # written by programs
            extract=_without_licence,
        ),
        max_file_bytes=150_000,
    ),
    "c": _Domain(
        _Files("cython", "*.c *.cpp", extract=_without_licence),
        by_section=True,
        max_file_bytes=MAX_BYTES,
    ),
    "tests": _Domain(_Files("numpy scipy", "*/tests/*.py", extract=_without_docstrings)),
    "lexers": _Domain(
        _Files("pygments", "*/lexers/*.py", exclude="*/lexers/_*", extract=_without_docstrings)
    ),
    "readme": _Domain(
        _Files(_DESCRIBED, "*.dist-info/METADATA", extract=_description),
        _Files(
            "flax numpy optax orbax-checkpoint", "*.md *.rst", exclude="*/licenses/* */LICENSE*"
        ),
        by_section=True,
        max_file_bytes=150_000,
    ),
    "kern": _Domain(_Files("music21", "*.krn", extract=_notes)),
    "italian": _messages("ca", "gl", "it"),
    "germanic": _messages("da", "de", "nb", "nl", "no", "sv"),
}
_DOMAINS = _TRAIN | _NOVEL
TRAIN_DOMAINS: tuple[str, ...] = tuple(_TRAIN)
NOVEL_DOMAINS: tuple[str, ...] = tuple(_NOVEL)
