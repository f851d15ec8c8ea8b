"""The language of docstrings: first lines are whole sentences, arguments are noun phrases."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOT_FIRST = ("Of", "What", "Whether", "That", "Those", "So", "As", "Where", "Who", "Which", "How")
# Words that end in s and are no verbs in the third person.
NO_VERBS = {"This", "Its", "Always", "Less", "Thus", "Plus", "Versus", "Yes", "Bytes", "Tokens"}


def documented() -> Iterator[tuple[str, ast.AST, str]]:
    """Yields (where, node, docstring) of everything in the library that has one."""
    for path in sorted(p for d in ("demix_jax", "studies") for p in (ROOT / d).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                line = getattr(node, "lineno", 1)
                yield f"{path.relative_to(ROOT)}:{line}", node, text


def entries(text: str) -> Iterator[tuple[str, str]]:
    """Yields (name, meaning) of a docstring's Args and Attributes."""
    section, indent = "", ""
    for line in text.splitlines():
        if found := re.fullmatch(r"(\w+):", line):
            section, indent = found[1], ""
        elif section in ("Args", "Attributes") and line.strip():
            spaces = re.match(r" *", line)[0]
            indent = indent or spaces
            if spaces == indent and (
                found := re.match(r" +\*{0,2}(\w+)(?: \([^)]*\))?: +(.*)", line)
            ):
                yield found[1], found[2]


def test_no_first_line_begins_with_a_fragment():
    faults = [
        f"{where}: {text.splitlines()[0]}"
        for where, _, text in documented()
        if re.match(r"\w+", text) and re.match(r"\w+", text)[0] in NOT_FIRST
    ]
    assert not faults, "\n".join(faults)


def test_the_first_line_of_a_function_is_a_sentence_that_starts_with_a_verb():
    faults = []
    for where, node, text in documented():
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        first = text.split("\n\n")[0]
        word = (re.match(r"[A-Za-z]+", first) or [""])[0]
        verb = word.endswith("s") and word[0].isupper() and word not in NO_VERBS
        if not (verb and re.search(r"[.!:]\s*$", first)):
            faults.append(f"{where}: {first}")
    assert not faults, "\n".join(faults)


def test_arguments_are_noun_phrases_that_stand_alone():
    fragments = re.compile(rf"(?:{'|'.join(NOT_FIRST)})\b", re.IGNORECASE)
    faults = [
        f"{where}: {name}: {meaning}"
        for where, _, text in documented()
        for name, meaning in entries(text)
        if fragments.match(meaning)
    ]
    assert not faults, "\n".join(faults)
