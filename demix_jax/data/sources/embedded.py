"""The embedded corpus: sixteen domains of real text that every installation already holds.

The text is read, at run time, from the files of Python distributions that this library needs
anyway (tensorflow-datasets, Keras and JAX with what they require), so nothing is downloaded or
shipped. Nothing is imported from them either: only their lists of files are consulted.

Trained on, with MB of text (2.5 is the cap):

    python     2.5  library code of JAX, Flax, Optax, Orbax and Keras, docstrings taken out
    tests      2.5  unit tests of NumPy and SciPy
    docs       2.5  docstrings of NumPy and SciPy: English in numpydoc form
    stubs      2.0  type stubs (.pyi)
    headers    2.5  C++ headers of TensorFlow, XLA and TSL
    c          2.5  C sources and headers of BoringSSL and smaller libraries
    dialects   2.5  C++ that MLIR's TableGen generates for its operations
    unicode    1.5  the Unicode character database, one character a line

Novel, met only at test time, each akin to some of the above:

    cython     2.3  Cython sources (python, stubs)
    cuda       2.5  CUDA C++ of CUB, Thrust, libcu++, CUTLASS and RAFT (headers)
    lexers     2.3  grammars of Pygments: Python made of regular expressions (python)
    comments   2.5  comments in the headers of MLIR, ICU, gRPC and CUDA: English (docs, headers)
    datasets   0.9  data set descriptions with their BibTeX citations (docs)
    readme     0.4  package descriptions in Markdown and reStructuredText (docs)
    urls       1.0  addresses, sizes and names of data files (unicode)
    wordlists  0.9  the built-in names of other programming languages (unicode)

One file may fill several documents; all of them are in one split. The four domains that come from
few files (unicode, readme, urls, wordlists) are split by section instead.
"""

import ast
import email
import hashlib
import inspect
import platform
import re
import sys
import unicodedata
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

_FORMAT = 1  # part of every fingerprint: raise it when the same files would give other text
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


@dataclass(frozen=True)
class _Characters:
    """Blocks of 256 characters in the manner of UnicodeData.txt, from the standard library."""

    def origin(self, domain: str) -> tuple[str, ...]:
        return (f"unicode=={unicodedata.unidata_version}",)

    def texts(self, domain: str) -> list[tuple[str, Callable[[], str]]]:
        blocks = range(0, sys.maxunicode + 1, 256)
        return [(f"unicode/{first:06X}", partial(self._text, first)) for first in blocks]

    def _text(self, first: int) -> str:
        return "".join(self._line(chr(code)) for code in range(first, first + 256))

    def _line(self, char: str) -> str:
        name = unicodedata.name(char, "")
        if not name or _NUMBERED.match(name):
            return ""
        number = unicodedata.numeric(char, None)
        kind = f"{unicodedata.category(char)};{unicodedata.combining(char)}"
        form = f"{unicodedata.bidirectional(char)};{unicodedata.decomposition(char)}"
        value = "" if number is None else f"{number:g}"
        mirrored = "Y" if unicodedata.mirrored(char) else "N"
        return f"{ord(char):04X};{name};{kind};{form};{value};{mirrored}\n"


class _Domain:
    """The collections of texts of one domain, and how they are split.

    Attributes:
        sources: collections of its texts.
        by_section: True if the sections of a file may be in different splits.
        max_file_bytes: largest number of bytes taken from one file, so that none dominates.
    """

    def __init__(
        self, *sources: _Files | _Characters, by_section: bool = False, max_file_bytes: int = 40_000
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
            f"which is not installed; pip install {name}"
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


# Characters named after their numbers: thousands of lines without information.
_NUMBERED = re.compile(r"(CJK|TANGUT|NUSHU|KHITAN) .*-[0-9A-F]+$|HANGUL SYLLABLE ")
_OPENING_COMMENTS = re.compile(r"\A(?:\s*(?:#(?![a-z])[^\n]*\n|//[^\n]*\n|/\*.*?\*/))+", re.DOTALL)
_LEGAL = re.compile(r"copyright|licen[cs]e", re.IGNORECASE)
_COMMENT = re.compile(r"(?:^[ \t]*//[^\n]*\n)+|/\*.*?\*/", re.DOTALL | re.MULTILINE)
_COMMENT_MARKS = re.compile(r"^[ \t]*(?:///?[!<]?|/\*+|\*+/?) ?|[ \t]*\*/$|[ \t]+$", re.MULTILINE)
_CHECKSUM = re.compile(r"\t[0-9a-f]{64}(?=\t|$)", re.MULTILINE)


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


def _strings(text: str) -> str:
    """Returns the string literals of some length in Python code, docstrings among them."""
    literals = (node for node in ast.walk(_parse(text)) if _is_string(node))
    return _join(inspect.cleandoc(str(literal.value)) for literal in literals)


def _comments(text: str) -> str:
    """Returns the comments of some length in C++ code, without the marks of comments."""
    comments = _COMMENT.findall(_without_licence(text))
    return _join(_COMMENT_MARKS.sub("", c).strip() for c in comments if not _LEGAL.search(c))


def _description(text: str) -> str:
    """Returns the package description that follows the fields of a METADATA file."""
    return str(email.message_from_string(text).get_payload())


def _without_checksums(text: str) -> str:
    """Returns a table of files without its column of SHA-256 sums: noise to a language model."""
    return _CHECKSUM.sub("", text)


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


_INCLUDE = "tensorflow/include/"
_EXTERNAL = _INCLUDE + "external/"
_MLIR = _EXTERNAL + "llvm-project/mlir/"
_DESCRIBED = """
    absl-py aiofiles array-record astunparse attrs certifi charset-normalizer dm-tree
    docstring-parser etils flatbuffers flax gast google-pasta grpcio h5py humanize idna
    immutabledict jax jaxlib keras markdown-it-py mdurl ml-dtypes msgpack namex numpy opt-einsum
    optax optree orbax-checkpoint packaging prometheus-client promise protobuf psutil pyarrow
    pygments pyyaml requests rich scipy simple-parsing simplejson six tensorflow
    tensorflow-datasets tensorflow-metadata tensorstore termcolor toml tqdm treescope
    typing-extensions urllib3 uvloop wrapt
"""

_TRAIN = {
    "python": _Domain(
        _Files(
            "jax flax optax orbax-checkpoint keras",
            "*.py",
            exclude="*_test.py */tests/* *_pb2.py keras/api/* keras/_tf_keras/*",
            extract=_without_docstrings,
        )
    ),
    "tests": _Domain(_Files("numpy scipy", "*/tests/*.py", extract=_without_docstrings)),
    "docs": _Domain(_Files("numpy scipy", "*.py", exclude="*/tests/*", extract=_docstrings)),
    "stubs": _Domain(
        _Files(
            "attrs googleapis-common-protos jax jaxlib numpy protobuf scipy tensorflow tensorstore",
            "*.pyi",
            extract=_without_licence,
        ),
        max_file_bytes=150_000,
    ),
    "headers": _Domain(
        _Files(
            "tensorflow",
            f"{_INCLUDE}tensorflow/*.h {_INCLUDE}xla/*.h {_INCLUDE}tsl/*.h",
            exclude="*.pb.h */external/*",
            extract=_without_licence,
        )
    ),
    "c": _Domain(
        _Files(
            "tensorflow",
            f"{_EXTERNAL}boringssl/*.[ch] {_EXTERNAL}curl/*.h {_EXTERNAL}hwloc/*.h "
            f"{_EXTERNAL}libwebp/*.h {_EXTERNAL}local_config_python/python_include/*.h",
            extract=_without_licence,
        )
    ),
    "dialects": _Domain(_Files("tensorflow", f"{_MLIR}*.h.inc {_MLIR}*.cpp.inc")),
    "unicode": _Domain(_Characters(), by_section=True),
}
_NOVEL = {
    "cython": _Domain(
        _Files(
            "h5py numpy pyarrow pyyaml scipy uvloop",
            "*.pyx *.pxd *.pxi",
            exclude="*/cython_blas.* */cython_lapack.* */_ufuncs*",  # written by programs
            extract=_without_licence,
        ),
        max_file_bytes=150_000,
    ),
    "cuda": _Domain(
        _Files(
            "tensorflow",
            f"{_EXTERNAL}cuda_cccl/* {_EXTERNAL}cutlass_archive/* {_EXTERNAL}raft/*",
            extract=_without_licence,
        )
    ),
    "lexers": _Domain(
        _Files("pygments", "*/lexers/*.py", exclude="*/lexers/_*", extract=_without_docstrings)
    ),
    "comments": _Domain(
        _Files(
            "tensorflow",
            f"{_MLIR}*.h {_EXTERNAL}icu/*.h {_EXTERNAL}cuda_cu*.h "
            f"{_EXTERNAL}com_github_grpc_grpc/*.h",
            exclude="*.pb.h *.upb*.h",
            extract=_comments,
        )
    ),
    "datasets": _Domain(
        _Files("tensorflow-datasets", "*.py", extract=_strings),
        _Files("tensorflow-datasets", "*/README.md *.bib"),
    ),
    "readme": _Domain(
        _Files(_DESCRIBED, "*.dist-info/METADATA", extract=_description),
        _Files(
            "flax numpy optax orbax-checkpoint", "*.md *.rst", exclude="*/licenses/* */LICENSE*"
        ),
        by_section=True,
        max_file_bytes=150_000,
    ),
    "urls": _Domain(
        _Files(
            "tensorflow-datasets",
            "*/checksums.tsv */url_checksums/*.txt */plantae_k_urls.txt",
            extract=_without_checksums,
        ),
        by_section=True,
        max_file_bytes=150_000,
    ),
    "wordlists": _Domain(
        _Files("pygments", "*/lexers/_*_builtins.py", extract=_without_docstrings),
        by_section=True,
        max_file_bytes=150_000,
    ),
}
_DOMAINS = _TRAIN | _NOVEL
TRAIN_DOMAINS: tuple[str, ...] = tuple(_TRAIN)
NOVEL_DOMAINS: tuple[str, ...] = tuple(_NOVEL)
