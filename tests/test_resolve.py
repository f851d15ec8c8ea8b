"""Which domains the sources of a configuration have, and where the text of each comes from."""

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest
from bucket import Bucket
from cases import case, folders

from demix_jax.config.schema import DataConfig
from demix_jax.data.sources import embedded
from demix_jax.data.sources.base import BadRecords, hash_split
from demix_jax.data.sources.resolve import Domains, find_domains
from demix_jax.errors import DemixError

ROWS = [
    {"text": "A", "lang": "en", "meta": {"body": "a"}},
    {"text": "B", "lang": "de", "meta": {"body": "b"}},
    {"text": "C", "lang": "fr", "meta": {"body": "c"}},
]


def write(folder: Path, *names: str) -> Path:
    """Files of the three ROWS, or of nothing else than their name if that is no JSON lines'."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in ROWS)
        (folder / name).write_text(lines if name.endswith(".jsonl") else name)
    return folder


def find(*places: Path | str, **settings: Any) -> Domains:
    return find_domains(DataConfig(sources=tuple(map(str, places)), **settings))


def texts(domains: Domains, name: str) -> list[str]:
    parts = domains.sources[name].parts()
    return [document.text for part in parts for document in part.documents(BadRecords())]


def test_all_kinds_of_domains_are_found_in_one_folder(tmp_path: Path) -> None:
    write(tmp_path, "law.jsonl", "med.jsonl.gz", "chat.jsonl.zst", "news/a.txt", "forum/a.jsonl")
    write(tmp_path, "A.NDJSON", "b.json.xz", "c.JSONL.BZ2")
    domains = find(tmp_path)
    found = ("A", "b", "c", "chat", "forum", "law", "med", "news")
    assert domains.train == tuple(domains.sources) == found
    assert domains.novel == ()
    assert texts(domains, "law") == texts(domains, "forum") == ["A", "B", "C"]
    assert texts(domains, "news") == ["news/a.txt"]


def test_hidden_files_and_others_are_no_domains(tmp_path: Path) -> None:
    write(tmp_path, "law/a.txt", ".hidden.jsonl", ".law/d.txt", "notes.txt", "old.json")
    write(tmp_path, "README.md", "_SUCCESS", "law.jsonl.bak", "__pycache__/a.pyc", "lost+found/a")
    assert list(find(tmp_path).sources) == ["law"]
    for name in ("med.jsonl.part", "med.jsonl.lz4", "med.json.gz.tmp"):
        with case(name):
            write(tmp_path, name)
            with pytest.raises(DemixError, match=f"has {name}, whose name does not end like"):
                find(tmp_path)
            (tmp_path / name).unlink()


def test_domains_are_found_in_folders_elsewhere(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for protocol in ["file", "memory", "bucket"]:
        with case(protocol):
            folder = next(fresh)
            write(folder, "law.jsonl", "med/a.jsonl")
            for path in ("law.jsonl", "med/a.jsonl"):
                data = (folder / path).read_bytes()
                fsspec.filesystem("memory").pipe(f"/elsewhere/{path}", data)
                Bucket.objects[f"elsewhere/{path}"] = data
            folder = str(folder) if protocol == "file" else "elsewhere"
            for place in (f"{protocol}://{folder}", f"{protocol}://{folder}/"):
                domains = find(place)
                assert domains.train == ("law", "med")
                assert texts(domains, "law") == texts(domains, "med") == ["A", "B", "C"]


def test_options_of_a_folder_are_those_of_its_domains(tmp_path: Path) -> None:
    write(tmp_path, "law.jsonl", "med/a.jsonl")
    domains = find(f"{tmp_path}?field=meta/body&where=lang:de|fr")
    assert texts(domains, "law") == texts(domains, "med") == ["b", "c"]


NAMED = {
    "law={}/law.jsonl": ["A", "B", "C"],
    "law=file://{}/law.jsonl": ["A", "B", "C"],
    "law={}/shards": ["A", "B", "C"] * 2,
    "law={}/shards/": ["A", "B", "C"] * 2,
    "law={}/shards/**": ["A", "B", "C"] * 2,
    "law={}/sha*/x-[0-9].jsonl": ["A", "B", "C"] * 2,
    "law={}/shards/x-[2-9].jsonl": ["A", "B", "C"],
    "law={}/shards/x-?.jsonl": ["A", "B", "C"] * 2,
    "law={}/shards/?-1.jsonl": ["A", "B", "C"],
    "law={}/x=1/a.jsonl": ["A", "B", "C"],
    "law={}/x=?/a.jsonl?field=meta/body": ["a", "b", "c"],
    "law={}/shards/x-?.jsonl?where=lang:en": ["A", "A"],
    "law={}/law.jsonl?field=meta/body": ["a", "b", "c"],
    "law={}/law.jsonl?where=lang:en": ["A"],
    "law={}/law.jsonl?where=lang:en|fr": ["A", "C"],
    "law={}/law.jsonl?where=lang:en|fr&where=meta/body:b|c": ["C"],
    "law={}/law.jsonl?where=lang:de&field=meta/body": ["b"],
    "law={}/law.jsonl?where=meta/body:x": [],
    "law={}/one.txt": ["one.txt"],
    "law={}/texts": ["texts/a.md", "texts/b"],
    "law=memory://named/law.jsonl": ["A", "B", "C"],
    "law=memory://named?where=lang:en": ["A"],
    "law=memory://named/*.jsonl?field=meta/body": ["a", "b", "c"],
}


def test_a_named_domain_is_where_it_says(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for place, expected in NAMED.items():
        with case(place, expected):
            folder = next(fresh)
            write(folder, "law.jsonl", "shards/x-1.jsonl", "shards/x-2.jsonl", "x=1/a.jsonl")
            write(folder, "one.txt", "texts/a.md", "texts/b")
            fsspec.filesystem("memory").pipe(
                "/named/law.jsonl", (folder / "law.jsonl").read_bytes()
            )
            domains = find(place.format(folder))
            assert domains.train == ("law",)
            assert texts(domains, "law") == expected


def test_named_domains_stand_beside_others(tmp_path: Path) -> None:
    write(tmp_path, "far/a.jsonl", "near/med.jsonl")
    domains = find(f"law={tmp_path}/far", tmp_path / "near", "embedded")
    assert domains.train == ("law", "med", *embedded.TRAIN_DOMAINS)
    assert domains.novel == embedded.NOVEL_DOMAINS


def test_domains_that_are_not_asked_for_are_not_looked_for(tmp_path: Path) -> None:
    write(tmp_path, "law.jsonl")
    places = (f"med={tmp_path}/none.jsonl", f"law={tmp_path}/law.jsonl")
    domains = find(*places, train_domains=("law",))
    assert list(domains.sources) == ["law"]
    with pytest.raises(DemixError, match="domain 'med': .* has no files"):
        find(*places, train_domains=("law",), novel_domains=("med",))


def test_size_of_parts_is_the_configurations(tmp_path: Path) -> None:
    write(tmp_path, "near/law.jsonl")
    size = (tmp_path / "near" / "law.jsonl").stat().st_size
    domains = find(f"med={tmp_path}/near/law.jsonl", tmp_path / "near", part_bytes=size // 2 + 1)
    for name in ("law", "med"):
        assert len(domains.sources[name].parts()) == 2
        assert texts(domains, name) == ["A", "B", "C"]


BAD_PLACES = {
    "law={}/none.jsonl": r"^domain 'law': .*none\.jsonl has no files; name a file, a folder or",
    "law={}/*.csv": r"^domain 'law': .*\*\.csv has no files",
    "law={}/law.jsonl?feild=body": r"law\.jsonl; did you mean 'field'\? \(options of files: field",
    "law={}/law.jsonl?split=train": r"^domain 'law': unknown option 'split' of /.*law\.jsonl",
    "{}?filed=body": r"^unknown option 'filed' of /.*; did you mean 'field'\?",
    "law={}/law.jsonl?where=lang": r"^domain 'law': where=lang is not FIELD:VALUE or F.*:VALUE\|V",
    "law={}/law.jsonl?where=:en": "where=:en is not FIELD:VALUE",
    "law={}/law.jsonl?field=a&where": "'where' in '.*' is not KEY=VALUE",
    "law=gx://bucket/law.jsonl": "^domain 'law': gx://bucket/law.jsonl cannot be opened: .*gx",
    "law=bucket://private/law.jsonl": "^domain 'law': .* cannot be listed: no credentials",
    "bucket://private/law": "^bucket://private/law cannot be listed: no credentials",
    "my law={}/law.jsonl": "name 'my law' does not fit a path",
    "shared={}/law.jsonl": "name 'shared' is taken",
    "{}/none": "none' is neither 'embedded' nor a folder; name one domain as NAME=PLACE",
    "{}/law.jsonl": "neither 'embedded' nor a folder; name one domain as NAME=PLACE",
    "embeded": "'embeded' is neither 'embedded' nor a folder",
    "{}/empty": r"empty' holds no <domain>\.jsonl",
}


def test_bad_place_is_one_line(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for place, message in BAD_PLACES.items():
        with case(place, message):
            folder = next(fresh)
            write(folder, "law.jsonl", "empty/notes.txt")
            with pytest.raises(DemixError, match=message) as caught:
                find(place.format(folder))
            assert "\n" not in str(caught.value)


def test_options_of_json_lines_on_plain_text_are_an_error(tmp_path: Path) -> None:
    write(tmp_path, "law/a.txt")
    for option in ("field=body", "where=lang:en"):
        source = find(f"law={tmp_path}/law?{option}").sources["law"]
        with pytest.raises(DemixError, match="options field and where are for JSON lines"):
            source.parts()


def test_datasets_and_tasks_are_not_opened_before_they_are_read(tmp_path: Path) -> None:
    places = ("a=tfds:no_such_dataset:1.0.0?field=x&train=train[:1%]", "b=seqio:no_such_module:t")
    assert set(find(*places).sources) == {"a", "b"}
    for place in ("a=tfds:no_such_dataset?feild=x", "a=seqio:no_such_module:t?feild=x"):
        with pytest.raises(DemixError, match="^domain 'a': .*'feild'"):
            find(place)


def test_prepared_data_in_a_source_is_no_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "law.jsonl", "out/data.json", "out/law/x/train-00000.tokens")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    (tmp_path / "link").rename(tmp_path.parent / "link")
    monkeypatch.chdir(tmp_path)
    for folder in ("out", "./out/", f"{tmp_path}/out", "../link", "out/law/.."):
        for source in (".", str(tmp_path), f"{tmp_path}/", f"file://{tmp_path}"):
            assert list(find(source, dir=folder).sources) == ["law"]
    for folder in ("other", "elsewhere/out"):
        with pytest.raises(DemixError, match="^domain 'out': .* has data.json, which can be"):
            find(tmp_path, dir=folder)


def test_prepared_data_in_a_source_elsewhere_is_no_domain() -> None:
    for path in ("law.jsonl", "out/data.json"):
        fsspec.filesystem("memory").pipe(f"/both/{path}", b"{}")
    assert list(find("memory://both", dir="memory://both/out/").sources) == ["law"]
    with pytest.raises(DemixError, match="^domain 'out': .* has data.json, which can be"):
        find("memory://both", dir="out")


def test_embedded_domains_are_trained_on_or_novel_as_declared() -> None:
    domains = find("embedded")
    assert domains.train == embedded.TRAIN_DOMAINS
    assert domains.novel == embedded.NOVEL_DOMAINS


def test_embedded_domain_is_what_the_corpus_reads() -> None:
    source = find("embedded").sources["readme"]
    (part,) = source.parts()
    expected = list(embedded.read_domain("readme"))
    assert list(part.documents(BadRecords())) == list(part.documents(BadRecords())) == expected
    assert source.fingerprint() == embedded.fingerprint("readme")
    assert (
        source.cheap_fingerprint()
        == source.cheap_fingerprint()
        != find("embedded").sources["c"].cheap_fingerprint()
    )


def test_domains_come_in_the_order_asked_for(tmp_path: Path) -> None:
    write(tmp_path, *(f"{name}.jsonl" for name in "abcd"))
    domains = find(tmp_path, train_domains=("d", "b"), novel_domains=("c",))
    assert (domains.train, domains.novel) == (("d", "b"), ("c",))
    assert list(domains.sources) == ["d", "b", "c"]


def test_domain_named_novel_is_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path, *(f"{name}.jsonl" for name in "abc"))
    assert find(tmp_path, novel_domains=("b",)).train == ("a", "c")


def test_declared_novel_domain_can_be_trained_on() -> None:
    domains = find("embedded", train_domains=("python", "kern"))
    assert "cuda" not in domains.novel
    assert "cython" in domains.novel


def test_naming_a_novel_domain_does_not_train_on_the_other_novel_ones() -> None:
    assert find("embedded", novel_domains=("kern",)).train == embedded.TRAIN_DOMAINS


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


TWICE = {
    "two files": ("{}/.two/files",),
    "file and folder": ("{}/three",),
    "two sources": ("{}", "{}/four"),
    "named and in a folder": ("law={}/two/law.jsonl", "{}"),
    "named twice": ("law={}/law.jsonl", "law={}/two/law.jsonl"),
}


def test_domain_that_is_found_twice_is_an_error(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for places in TWICE.values():
        with case(places):
            folder = next(fresh)
            write(
                folder,
                "law.jsonl",
                "two/law.jsonl",
                "three/law.jsonl",
                "three/law/a.jsonl",
                "four/law/b",
            )
            write(folder, ".two/files/law.jsonl", ".two/files/law.jsonl.gz")
            asked = [place.format(folder) for place in places]
            assert len(places) == 1 or all(find(place).train for place in asked)
            with pytest.raises(DemixError, match="domain 'law' is found twice in ") as caught:
                find(*asked)
            assert str(caught.value).endswith(", ".join(asked))


def test_domain_called_like_an_embedded_one_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, "python.jsonl")
    with pytest.raises(DemixError, match="'python' is found twice in embedded, "):
        find("embedded", tmp_path)


def test_unknown_domain_names_the_valid_ones(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for kind in ["train_domains", "novel_domains"]:
        with case(kind):
            folder = next(fresh)
            write(folder, "law.jsonl", "medicine.jsonl")
            message = r"'medecine'; did you mean 'medicine'\? \(domains: law, medicine\)"
            with pytest.raises(DemixError, match=message):
                find(folder, **{kind: ("medecine",)})


def test_file_whose_name_is_no_domain_is_an_error(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for name in ["a.b.jsonl", "my law.jsonl", ".jsonl.jsonl", "_x.jsonl.gz"]:
        with case(name):
            folder = next(fresh)
            write(folder, name)
            with pytest.raises(DemixError, match="does not fit a path|holds no"):
                find(folder)
