"""Sources of text: which documents they hold, how they are split, and what is wrong with them."""

import gzip
import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from demix_jax import corpus
from demix_jax.config import DataConfig
from demix_jax.documents import Document
from demix_jax.domains import Domains, find_domains, hash_split, read_task
from demix_jax.errors import DemixError

ENDINGS = ["jsonl", "jsonl.gz", "jsonl.zst"]
ROWS: list[dict[str, Any]] = [
    {"text": "plain words", "id": "first", "split": "train"},
    {"text": "line\nbreak\r\n\ttab  \n", "id": "second", "split": "valid"},
    {"text": "no id", "split": "test"},
    {"text": "no split 👍🏽 é e\u0301 漢 \u2028 \0", "id": 4},
    {"text": "other names", "id": "e", "split": "validation", "more": [1, {"a": None}]},
    {"text": "", "id": "empty", "split": "dev"},
    {"text": "last", "id": "z", "split": "val"},
]


def expected_documents(file: str) -> list[Document]:
    return [
        Document("plain words", "first", "train"),
        Document("line\nbreak\r\n\ttab  \n", "second", "valid"),
        Document("no id", f"{file}:3", "test"),
        Document("no split 👍🏽 é e\u0301 漢 \u2028 \0", "4", None),
        Document("other names", "e", "valid"),
        Document("", "empty", "valid"),
        Document("last", "z", "valid"),
    ]


def compress(data: bytes, ending: str) -> bytes:
    if ending.endswith("gz"):
        return gzip.compress(data, mtime=0)
    if ending.endswith("zst"):
        return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    return data


def write_lines(path: Path, lines: Iterable[str | bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = [line if isinstance(line, bytes) else line.encode() for line in lines]
    path.write_bytes(compress(b"".join(line + b"\n" for line in raw), path.name))
    return path


def write_texts(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def find(*folders: Path | str, **settings: Any) -> Domains:
    return find_domains(DataConfig(sources=tuple(str(folder) for folder in folders), **settings))


def read(folder: Path, name: str, skip: int = 0) -> list[Document]:
    return list(find(folder).sources[name].documents(skip))


def fingerprint(folder: Path, name: str) -> str:
    return find(folder).sources[name].fingerprint()


def numbered(count: int) -> list[str]:
    return [json.dumps({"text": f"document {i}"}) for i in range(count)]


@pytest.mark.parametrize("ending", ENDINGS)
def test_json_lines_are_read(tmp_path: Path, ending: str) -> None:
    write_lines(tmp_path / f"law.{ending}", map(json.dumps, ROWS))
    assert read(tmp_path, "law") == expected_documents(f"law.{ending}")


@pytest.mark.parametrize("ending", ENDINGS)
def test_many_json_lines_are_read_in_order(tmp_path: Path, ending: str) -> None:
    write_lines(tmp_path / f"law.{ending}", numbered(20_000))
    assert [d.text for d in read(tmp_path, "law")] == [f"document {i}" for i in range(20_000)]


def test_unescaped_unicode_and_blank_lines_and_no_last_newline_are_fine(tmp_path: Path) -> None:
    (tmp_path / "law.jsonl").write_bytes('\n{"text": "é 👍"}\r\n   \n{"text": "b"}'.encode())
    assert read(tmp_path, "law") == [Document("é 👍", "law.jsonl:2"), Document("b", "law.jsonl:4")]


def test_archives_joined_end_to_end_are_read_whole(tmp_path: Path) -> None:
    for ending in ENDINGS[1:]:
        parts = [compress(f'{{"text": "{part}"}}\n'.encode(), ending) for part in "ab"]
        (tmp_path / f"{ending[6:]}.{ending}").write_bytes(b"".join(parts))
    assert [d.text for d in read(tmp_path, "gz")] == ["a", "b"]
    assert [d.text for d in read(tmp_path, "zst")] == ["a", "b"]


def test_text_folder_without_splits_is_read(tmp_path: Path) -> None:
    write_texts(tmp_path / "law", {"b.txt": "B\r\n", "a.md": " A 👍", "deep/er/c": "C", "e": ""})
    assert read(tmp_path, "law") == [
        Document(" A 👍", "a.md"),
        Document("B\r\n", "b.txt"),
        Document("C", "deep/er/c"),
        Document("", "e"),
    ]


def test_text_folder_with_splits_is_read(tmp_path: Path) -> None:
    write_texts(
        tmp_path / "law",
        {"train/x/a.txt": "A", "valid/b.txt": "B", "test/c.txt": "C", "dev/d.txt": "D", "e": "E"},
    )
    assert set(read(tmp_path, "law")) == {
        Document("A", "train/x/a.txt", "train"),
        Document("B", "valid/b.txt", "valid"),
        Document("C", "test/c.txt", "test"),
        Document("D", "dev/d.txt", "valid"),
        Document("E", "e", None),
    }


def test_file_called_like_a_split_has_no_split(tmp_path: Path) -> None:
    write_texts(tmp_path / "law", {"train": "A", "x/valid/b": "B"})
    assert {document.split for document in read(tmp_path, "law")} == {None}


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    write_texts(tmp_path / "law", {"a.txt": "A", ".b.txt": "B", ".git/c.txt": "C"})
    write_texts(tmp_path, {".hidden.jsonl": "x", ".law/d.txt": "D", "notes.txt": "N"})
    assert list(find(tmp_path).sources) == ["law"]
    assert [document.id for document in read(tmp_path, "law")] == ["a.txt"]


def test_all_kinds_of_domains_are_found_in_one_folder(tmp_path: Path) -> None:
    write_lines(tmp_path / "law.jsonl", numbered(1))
    write_lines(tmp_path / "med.jsonl.gz", numbered(1))
    write_lines(tmp_path / "chat.jsonl.zst", numbered(1))
    write_texts(tmp_path / "news", {"a": "A"})
    domains = find(tmp_path)
    assert set(domains.train) == set(domains.sources) == {"law", "med", "chat", "news"}
    assert domains.novel == ()


def test_embedded_domains_are_trained_on_or_novel_as_declared() -> None:
    domains = find("embedded")
    assert domains.train == corpus.TRAIN_DOMAINS
    assert domains.novel == corpus.NOVEL_DOMAINS


def test_domains_come_in_the_order_asked_for(tmp_path: Path) -> None:
    for name in "abcd":
        write_lines(tmp_path / f"{name}.jsonl", numbered(1))
    domains = find(tmp_path, train_domains=("d", "b"), novel_domains=("c",))
    assert (domains.train, domains.novel) == (("d", "b"), ("c",))
    assert list(domains.sources) == ["d", "b", "c"]


def test_domain_named_novel_is_not_trained_on(tmp_path: Path) -> None:
    for name in "abc":
        write_lines(tmp_path / f"{name}.jsonl", numbered(1))
    assert find(tmp_path, novel_domains=("b",)).train == ("a", "c")


def test_declared_novel_domain_can_be_trained_on() -> None:
    domains = find("embedded", train_domains=("python", "cuda"))
    assert "cuda" not in domains.novel
    assert "cython" in domains.novel


def test_naming_a_novel_domain_does_not_train_on_the_other_novel_ones() -> None:
    assert find("embedded", novel_domains=("cuda",)).train == corpus.TRAIN_DOMAINS


def test_hash_split_is_the_first_32_bits_of_sha256() -> None:
    for i in range(1000):
        text = f"text {i} é"
        share = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8
        expected = "train" if share < 0.9 else "valid" if share < 0.95 else "test"
        assert hash_split(text) == expected


def test_hash_split_is_90_5_5() -> None:
    count = 40_000
    found = Counter(hash_split(f"generated document {i}") for i in range(count))
    for split, share in {"train": 0.9, "valid": 0.05, "test": 0.05}.items():
        deviation = (count * share * (1 - share)) ** 0.5
        assert abs(found[split] - count * share) < 4 * deviation


@pytest.mark.parametrize("ending", ENDINGS)
def test_fingerprint_follows_the_content(tmp_path: Path, ending: str) -> None:
    prints = []
    for lines in (numbered(10), numbered(11), numbered(10)):
        write_lines(tmp_path / f"law.{ending}", lines)
        prints.append(fingerprint(tmp_path, "law"))
    assert prints[0] == prints[2] != prints[1]


@pytest.mark.parametrize(
    "change",
    [
        {"a.txt": "a"},
        {"c.txt": ""},
        {"a.txt": "AB", "b.txt": ""},
    ],
)
def test_fingerprint_follows_the_files_of_a_folder(tmp_path: Path, change: dict[str, str]) -> None:
    files = {"a.txt": "A", "b.txt": "B"}
    write_texts(tmp_path / "one" / "law", files)
    write_texts(tmp_path / "two" / "law", files | change)
    assert fingerprint(tmp_path / "one", "law") != fingerprint(tmp_path / "two", "law")


def test_fingerprint_follows_a_file_moved_to_another_split(tmp_path: Path) -> None:
    write_texts(tmp_path / "one" / "law", {"train/a.txt": "A", "train/b.txt": "B"})
    write_texts(tmp_path / "two" / "law", {"train/a.txt": "A", "valid/b.txt": "B"})
    assert fingerprint(tmp_path / "one", "law") != fingerprint(tmp_path / "two", "law")


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "cut": ('{"text": "a', "broken JSON"),
    "no JSON": ("hello", "broken JSON"),
    "two objects": ('{"text": "a"} {"text": "b"}', "broken JSON"),
    "invalid UTF-8": (b'{"text": "\xff"}', "invalid UTF-8 at byte 10"),
    "missing text": ('{"id": "a"}', "string field 'text'"),
    "text of another type": ('{"text": 3}', "string field 'text'"),
    "null text": ('{"text": null}', "string field 'text'"),
    "no object": ('["text"]', "string field 'text'"),
    "wrong split": ('{"text": "a", "split": "eval"}', "unknown split 'eval'; use train, valid"),
    "empty split": ('{"text": "a", "split": ""}', "unknown split ''"),
    "lone surrogate": ('{"text": "\\ud800"}', "lone surrogate"),
}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(("line", "message"), BROKEN.values(), ids=BROKEN)
def test_bad_line_is_named_by_file_and_number(
    tmp_path: Path, ending: str, line: str | bytes, message: str
) -> None:
    write_lines(tmp_path / f"law.{ending}", [*numbered(2), "", line, *numbered(2)])
    with pytest.raises(DemixError, match=rf"/law\.{ending}:4: .*{message}"):
        read(tmp_path, "law")


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a", "split": ["train"]}',
        '{"text": "a", "number": ' + "1" * 5000 + "}",
        '{"text": "a", "list": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
    ids=["list as split", "long number", "deep list"],
)
def test_odd_line_is_named_by_file_and_number(tmp_path: Path, line: str) -> None:
    write_lines(tmp_path / "law.jsonl", [*numbered(2), line])
    with pytest.raises(DemixError, match=r"/law\.jsonl:3: "):
        read(tmp_path, "law")


@pytest.mark.parametrize("ending", ENDINGS)
def test_as_many_bad_lines_as_allowed_are_skipped(tmp_path: Path, ending: str) -> None:
    lines = ["{", *numbered(3), "[1]", *numbered(2), '{"text": 1}']
    write_lines(tmp_path / f"law.{ending}", lines)
    texts = [document.text for document in read(tmp_path, "law", skip=3)]
    assert texts == [f"document {i}" for i in (0, 1, 2, 0, 1)]


def test_one_bad_line_more_than_allowed_is_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "law.jsonl", ["{", *numbered(3), "[1]", '{"text": 1}', *numbered(1)])
    with pytest.raises(DemixError, match=r"law\.jsonl:6: .*\(2 bad lines were allowed\)"):
        read(tmp_path, "law", skip=2)


def test_invalid_utf8_in_a_text_file_is_named(tmp_path: Path) -> None:
    write_texts(tmp_path / "law", {"a.txt": "fine", "x/b.txt": b"ab\xe9c"})
    with pytest.raises(DemixError, match=r"law/x/b\.txt: invalid UTF-8 at byte 2"):
        read(tmp_path, "law")


def damaged(ending: str, damage: Callable[[bytes], bytes]) -> bytes:
    rng = random.Random(0)
    texts = ("".join(rng.choices("abcdefghij ", k=200)) for _ in range(3000))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    return damage(compress(lines.encode(), ending))


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("cut", [0.1, 0.5, 0.99])
@pytest.mark.parametrize(
    "ending",
    [
        "jsonl.gz",
        "jsonl.zst",
    ],
)
def test_cut_archive_is_an_error(tmp_path: Path, ending: str, cut: float, skip: int) -> None:
    content = damaged(ending, lambda data: data[: int(cut * len(data))])
    (tmp_path / f"law.{ending}").write_bytes(content)
    with pytest.raises(DemixError, match=rf"law\.{ending}: cannot be decompressed"):
        read(tmp_path, "law", skip)


@pytest.mark.parametrize("ending", ENDINGS[1:])
def test_archive_that_is_none_is_an_error(tmp_path: Path, ending: str) -> None:
    (tmp_path / f"law.{ending}").write_text('{"text": "a"}\n')
    with pytest.raises(DemixError, match=rf"law\.{ending}: cannot be decompressed"):
        read(tmp_path, "law")


@pytest.mark.parametrize("ending", ENDINGS[1:])
def test_archive_with_a_wrong_checksum_is_an_error(tmp_path: Path, ending: str) -> None:
    trailer = -8 if ending.endswith("gz") else -4
    content = damaged(ending, lambda data: data[:trailer] + b"\0" * 4 + data[trailer:][4:])
    (tmp_path / f"law.{ending}").write_bytes(content)
    with pytest.raises(DemixError, match=rf"law\.{ending}: cannot be decompressed"):
        read(tmp_path, "law")


def test_archive_with_a_broken_block_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "law.jsonl.gz").write_bytes(gzip.compress(b"")[:10] + b"\xff" * 20)
    with pytest.raises(DemixError, match=r"law\.jsonl\.gz: cannot be decompressed"):
        read(tmp_path, "law")


def test_two_files_of_one_domain_are_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "law.jsonl", numbered(1))
    write_lines(tmp_path / "law.jsonl.gz", numbered(1))
    with pytest.raises(DemixError, match="'law' is found twice"):
        find(tmp_path)


def test_file_and_folder_of_one_domain_are_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "law.jsonl", numbered(1))
    write_texts(tmp_path / "law", {"a": "A"})
    with pytest.raises(DemixError, match="'law' is found twice"):
        find(tmp_path)


def test_one_domain_in_two_sources_is_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "one" / "law.jsonl", numbered(1))
    write_lines(tmp_path / "two" / "law.jsonl.zst", numbered(1))
    with pytest.raises(DemixError, match="'law' is found twice in .*one, .*two"):
        find(tmp_path / "one", tmp_path / "two")


def test_domain_called_like_an_embedded_one_is_an_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "python.jsonl", numbered(1))
    with pytest.raises(DemixError, match="'python' is found twice in embedded, "):
        find("embedded", tmp_path)


@pytest.mark.parametrize("kind", ["train_domains", "novel_domains"])
def test_unknown_domain_names_the_valid_ones(tmp_path: Path, kind: str) -> None:
    for name in ("law", "medicine"):
        write_lines(tmp_path / f"{name}.jsonl", numbered(1))
    message = r"'medecine'; did you mean 'medicine'\? \(domains: law, medicine\)"
    with pytest.raises(DemixError, match=message):
        find(tmp_path, **{kind: ("medecine",)})


def test_missing_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DemixError, match="nowhere' is neither 'embedded' nor a folder"):
        find(tmp_path / "nowhere")


def test_file_as_source_is_an_error(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "law.jsonl", numbered(1))
    with pytest.raises(DemixError, match="neither 'embedded' nor a folder"):
        find(path)


def test_source_without_domains_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DemixError, match="holds no <domain>.jsonl"):
        find(tmp_path)


@pytest.mark.parametrize("name", ["a.b.jsonl", "my law.jsonl", ".jsonl.jsonl", "_x.jsonl.gz"])
def test_file_whose_name_is_no_domain_is_an_error(tmp_path: Path, name: str) -> None:
    write_lines(tmp_path / name, numbered(1))
    with pytest.raises(DemixError, match="does not fit a path|holds no"):
        find(tmp_path)


# What follows imports TensorFlow.


def task(folder: Path, name: str, split: str, skip: int = 0) -> list[Document]:
    return list(read_task(name, find(folder).sources[name], split, skip))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Declared and undeclared splits, in every kind of source."""
    folder = tmp_path_factory.mktemp("mixed")
    for ending in ENDINGS:
        name = ending.replace(".", "-") + f".{ending}"
        write_lines(folder / name, [*map(json.dumps, ROWS), *numbered(500)])
    files: dict[str, str | bytes] = {f"{i}.txt": f"text {i} é\0\n" for i in range(200)}
    files |= {"train/a": "A", "valid/b": "B", "test/c": "C" * 300_000, "test/empty": ""}
    write_texts(folder / "texts", files)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("name", ["jsonl", "jsonl-gz", "jsonl-zst", "texts"])
def test_task_gives_the_documents_of_its_split(mixed: Path, name: str, split: str) -> None:
    direct = [(d, d.split or hash_split(d.text)) for d in read(mixed, name)]
    expected = [Document(d.text, d.id, s) for d, s in direct if s == split]
    assert len(expected) > 5
    assert task(mixed, name, split) == expected


@pytest.mark.slow
def test_split_of_a_document_does_not_depend_on_its_place(tmp_path: Path) -> None:
    lines = numbered(400)
    write_lines(tmp_path / "one.jsonl", lines)
    random.Random(0).shuffle(lines)
    write_lines(tmp_path / "two.jsonl", [*lines[:200], json.dumps({"text": "new"}), *lines[200:]])
    for split in ("valid", "test"):
        one, two = ({d.text for d in task(tmp_path, name, split)} for name in ("one", "two"))
        assert one == two - {"new"} != set()


@pytest.mark.slow
def test_task_passes_on_what_is_wrong_with_the_text(tmp_path: Path) -> None:
    write_lines(tmp_path / "law.jsonl", [*numbered(100), "{"])
    with pytest.raises(DemixError, match=r"^/.*/law\.jsonl:101: broken JSON: [^\n]* at column 1$"):
        task(tmp_path, "law", "train")


@pytest.mark.slow
def test_task_skips_bad_lines_when_allowed(tmp_path: Path) -> None:
    write_lines(tmp_path / "law.jsonl", ["{", '{"text": "a", "split": "test"}', "{"])
    assert [d.text for d in task(tmp_path, "law", "test", skip=2)] == ["a"]


@pytest.mark.slow
def test_task_of_an_empty_split_is_empty(tmp_path: Path) -> None:
    (tmp_path / "law.jsonl").touch()
    assert task(tmp_path, "law", "train") == []


@pytest.mark.slow
def test_task_can_be_left_early(tmp_path: Path) -> None:
    write_lines(tmp_path / "law.jsonl", numbered(2000))
    documents = read_task("law", find(tmp_path).sources["law"], "train", 0)
    assert [next(documents).text for _ in range(3)] == [
        f"document {i}" for i in range(10) if hash_split(f"document {i}") == "train"
    ][:3]


@pytest.mark.slow
def test_task_names_the_line_of_an_id_that_is_no_utf8(tmp_path: Path) -> None:
    write_lines(tmp_path / "law.jsonl", ['{"text": "a", "id": "\\ud800", "split": "train"}'])
    with pytest.raises(DemixError, match=r"law\.jsonl:1: "):
        task(tmp_path, "law", "train")
