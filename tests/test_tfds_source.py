"""TFDS datasets that are built here, on disk, in both file formats, and read as domains."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import reviews
from cases import case, folders

from demix_jax.data.sources.base import BadRecords
from demix_jax.data.sources.tfds_source import TfdsSource
from demix_jax.errors import DemixError

pytestmark = pytest.mark.slow
FORMATS = ("array_record", "tfrecord")
REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def roots(tmp_path_factory):
    """For each file format, a folder that TFDS keeps the built datasets in."""
    roots = {name: tmp_path_factory.mktemp(name) for name in FORMATS}
    for name, root in roots.items():
        for config in reviews.SIZES:
            reviews.build(root, config, name)
    return roots


@pytest.fixture
def copied(roots, tmp_path):
    """Copies a built config and returns the folder of its version."""

    def copy(config, file_format):
        source = roots[file_format] / "demix_reviews" / config / "1.2.0"
        return shutil.copytree(source, tmp_path / f"{config}-{file_format}" / "1.2.0")

    return copy


def read(source, allowed=0):
    broken = BadRecords(allowed)
    return [document for part in source.parts() for document in part.documents(broken)]


def open_source(roots, config, file_format="array_record", **options):
    address = f"demix_reviews/{config}:1.2.0"
    return TfdsSource(address, {"data_dir": str(roots[file_format]), **options})


def texts(documents, split):
    return [document.text for document in documents if document.split == split]


def rows_of(config, split):
    return [row["text"] for row in reviews.rows(config, split)]


def hashed(text):
    share = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if share < 0.9 else "valid" if share < 0.95 else "test"


def run(program, *arguments, folders=()):
    """What a fresh Python prints, as JSON; it finds modules in the repository and `folders`."""
    paths = os.pathsep.join(map(str, (REPOSITORY, *folders)))
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_documents_are_the_generated_ones_in_order(roots):
    for file_format in FORMATS:
        with case(file_format):
            documents = read(open_source(roots, "short", file_format))
            for ours, theirs in (("train", "train"), ("valid", "validation"), ("test", "test")):
                assert texts(documents, ours) == rows_of("short", theirs)
                ids = [document.id for document in documents if document.split == ours]
                assert ids == [f"{theirs}/{i}" for i in range(reviews.SIZES["short"][theirs])]


def test_each_file_is_a_part(roots):
    for file_format in FORMATS:
        with case(file_format):
            parts = open_source(roots, "short", file_format).parts()
            assert len(parts) == 3 * 4
            counts = [sum(1 for _ in part.documents(BadRecords())) for part in parts[:4]]
            assert min(counts) >= 50
            assert sum(counts) == 203
            folder = roots[file_format] / "demix_reviews" / "short" / "1.2.0"
            sizes = [path.stat().st_size for path in sorted(folder.glob("*-train.*"))]
            assert [part.size for part in parts[:4]] == sizes


def test_slices_partition_a_split(roots):
    for file_format in FORMATS:
        with case(file_format):
            slices = {"train": "train[:37%]", "valid": "train[75:150]", "test": "train[150:]"}
            source = open_source(roots, "short", file_format, **slices)
            documents, rows = read(source), rows_of("short", "train")
            assert texts(documents, "train") == rows[:75]  # 37 % of 203 is 75.1
            assert texts(documents, "valid") == rows[75:150]
            assert texts(documents, "test") == rows[150:]
            assert [document.id for document in documents] == [f"train/{i}" for i in range(203)]
            assert sum(part.size for part in source.parts()) == pytest.approx(
                sum(part.size for part in open_source(roots, "short", file_format).parts()[:4]),
                abs=3,
            )


def test_splits_can_be_added_up(roots):
    names = {"train": "test+train[100:120]", "valid": "train[:5]", "test": "validation[-3:]"}
    documents = read(open_source(roots, "short", **names))
    train, validation = rows_of("short", "train"), rows_of("short", "validation")
    assert texts(documents, "train") == rows_of("short", "test") + train[100:120]
    assert texts(documents, "valid") == train[:5]
    assert texts(documents, "test") == validation[-3:]
    assert documents[0].id == "test/0"
    assert documents[17].id == "train/100"


def test_a_nested_field_is_the_text(roots):
    for file_format in FORMATS:
        with case(file_format):
            documents = read(open_source(roots, "short", file_format, field="data/body"))
            bodies = [row["data"]["body"] for row in reviews.rows("short", "train")]
            assert texts(documents, "train") == bodies


def test_where_keeps_the_examples_that_hold(roots):
    for where, holds in [
        ("language:de", lambda row: row["language"] == "de"),
        ("language:de|fr", lambda row: row["language"] in ("de", "fr")),
        (["language:de", "label:good"], lambda r: r["language"] == "de" and r["label"] == 2),
        ("label:bad|2", lambda row: row["label"] in (0, 2)),
        ("data/stars:3|5", lambda row: row["data"]["stars"] in (3, 5)),
        ("ok:true", lambda row: row["ok"]),
        ("score:0.1|2e-1", lambda row: row["score"] in (0.1, 0.2)),
    ]:
        with case(where, holds):
            documents = read(open_source(roots, "short", where=where))
            kept = [(i, row) for i, row in enumerate(reviews.rows("short", "train")) if holds(row)]
            assert 0 < len(kept) < 203
            train = [document for document in documents if document.split == "train"]
            assert [document.text for document in train] == [row["text"] for _, row in kept]
            assert [document.id for document in train] == [f"train/{i}" for i, _ in kept]


def test_missing_splits_come_from_train_by_hash(roots):
    rows = rows_of("long", "train")
    documents = read(open_source(roots, "long"))
    assert [document.text for document in documents] == rows
    assert [document.split for document in documents] == [hashed(text) for text in rows]
    assert {document.split for document in documents} == {"train", "valid", "test"}


def test_only_the_missing_split_comes_from_train(roots):
    rows = rows_of("long", "train")
    documents = read(open_source(roots, "long", train="train[:300]", valid="train[300:]"))
    assert texts(documents, "valid") == rows[300:]
    assert texts(documents, "test") == [text for text in rows[:300] if hashed(text) == "test"]
    assert texts(documents, "train") == [text for text in rows[:300] if hashed(text) != "test"]
    assert texts(documents, "test")


def test_a_folder_is_read_as_its_name_is(roots):
    folder = roots["tfrecord"] / "demix_reviews" / "long" / "1.2.0"
    by_folder, by_name = TfdsSource(str(folder), {}), open_source(roots, "long", "tfrecord")
    assert read(by_folder) == read(by_name)
    assert by_folder.fingerprint() == by_name.fingerprint()


def test_another_process_reads_the_same_without_the_builder(roots, tmp_path):
    fresh = folders(tmp_path)
    for file_format in FORMATS:
        with case(file_format):
            folder = next(fresh)
            source = open_source(
                roots, "short", file_format, where="language:de", train="train[9:]"
            )
            (folder / "parts").write_bytes(pickle.dumps(source.parts()))
            program = (
                "import json, pickle, sys\n"
                "from demix_jax.data.sources.base import BadRecords\n"
                "parts = pickle.load(open(sys.argv[1], 'rb'))\n"
                "found = [d for part in reversed(parts) for d in part.documents(BadRecords())]\n"
                "print(json.dumps([found, 'tensorflow' in sys.modules, 'reviews' in sys.modules]))"
            )
            found, tensorflow, builder = run(program, folder / "parts")
            assert sorted(map(tuple, found)) == sorted(read(source))
            assert len(found) > 50
            assert tensorflow == (file_format == "tfrecord")
            assert not builder


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_part_reads_its_own_file_only(copied, file_format):
    folder = copied("short", file_format)
    parts = TfdsSource(str(folder), {}).parts()
    before = [list(part.documents(BadRecords())) for part in parts]
    for path in folder.glob("*-train.*"):
        if "-00002-of-" not in path.name:
            path.unlink()
    assert list(parts[2].documents(BadRecords())) == before[2]
    with pytest.raises(DemixError, match="00001-of-00004 cannot be read .*prepare .* again"):
        list(parts[1].documents(BadRecords()))
    with pytest.raises(DemixError, match="00000-of-00004 cannot be read .* complete"):
        TfdsSource(str(folder), {}).parts()


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_damaged_file_is_refused(copied, file_format):
    folder = copied("short", file_format)
    (path,) = folder.glob("*-train.*-00001-of-*")
    data = bytearray(path.read_bytes())
    records = data.index(bytes(64)) if file_format == "array_record" else len(data)  # then zeros
    assert records > 2000
    data[records // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(DemixError, match="00001-of-00004 cannot be read"):
        read(TfdsSource(str(folder), {}))


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_file_with_fewer_records_than_told_is_refused(copied, file_format):
    folder = copied("short", file_format)
    info = json.loads((folder / "dataset_info.json").read_text())
    (train,) = (split for split in info["splits"] if split["name"] == "train")
    train["shardLengths"][1] = str(int(train["shardLengths"][1]) + 3)
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(DemixError, match="00001-of-00004 .*prepare the dataset again"):
        read(TfdsSource(str(folder), {}))


def test_texts_that_are_not_utf8_count_as_broken(roots):
    source = open_source(roots, "other", train="broken")
    kept = [text for i, text in enumerate(rows_of("other", "broken")) if i % 2 == 0]
    found = [d.text for d in read(source, allowed=2) if d.id.startswith("broken/")]
    assert found == kept
    with pytest.raises(DemixError, match="broken/3: invalid UTF-8 at byte 0 .*1 bad"):
        read(source, allowed=1)


def test_fingerprint_knows_what_matters_and_nothing_else(roots, copied):
    folder = copied("short", "array_record")
    here, there = open_source(roots, "short"), TfdsSource(str(folder), {})
    assert here.fingerprint() == there.fingerprint()
    for path in folder.iterdir():
        os.utime(path, (1, 1))
    touched = TfdsSource(str(folder), {})
    assert touched.fingerprint() == here.fingerprint()
    assert touched.cheap_fingerprint() != here.cheap_fingerprint()
    others = [
        open_source(roots, "short", field="data/body"),
        open_source(roots, "short", where="language:de"),
        open_source(roots, "short", where="language:fr"),
        open_source(roots, "short", train="train[:99%]"),
        open_source(roots, "short", valid="test", test="validation"),
        open_source(roots, "long"),
    ]
    for mark in (TfdsSource.fingerprint, TfdsSource.cheap_fingerprint):
        assert len({mark(source) for source in (here, *others)}) == 7
    same = open_source(roots, "short", train="train[0:203]", valid="validation", test="test")
    assert same.fingerprint() == here.fingerprint()


def test_fingerprint_notices_another_version_and_other_files(roots, copied):
    folder = copied("short", "tfrecord")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(info | {"version": "1.2.1"}))
    before = open_source(roots, "short", "tfrecord").fingerprint()
    assert TfdsSource(str(folder), {}).fingerprint() != before
    (folder / "dataset_info.json").write_text(json.dumps(info))
    assert TfdsSource(str(folder), {}).fingerprint() == before
    (path,) = folder.glob("*-train.*-00003-of-*")
    path.write_bytes(path.read_bytes() + b"\0")
    assert TfdsSource(str(folder), {}).fingerprint() != before


def test_fingerprint_notices_a_dataset_built_from_other_data(roots, tmp_path, monkeypatch):
    other = {**reviews.SIZES, "short": {"train": 203, "validation": 31, "test": 17}}
    plain = reviews.rows

    def longer(config, split):
        rows = plain(config, split)
        rows[7]["text"] += " and more, of which nothing is said in the lengths" * 2
        return rows

    monkeypatch.setattr(reviews, "SIZES", other)
    monkeypatch.setattr(reviews, "rows", longer)
    folder = reviews.build(tmp_path, "short", "tfrecord")
    rebuilt, before = TfdsSource(folder, {}), open_source(roots, "short", "tfrecord")
    assert rebuilt.fingerprint() != before.fingerprint()
    assert rebuilt.cheap_fingerprint() != before.cheap_fingerprint()


def test_a_dataset_is_prepared_when_it_is_not_there(tmp_path):
    program = (
        "import json, sys\n"
        "from demix_jax.data.sources.base import BadRecords\n"
        "from demix_jax.data.sources.tfds_source import TfdsSource\n"
        "source = TfdsSource('demix_reviews/other', {'import': 'reviews', 'data_dir': sys.argv[1],"
        " 'train': 'train', 'where': ['language:en']})\n"
        "texts = [d.text for p in source.parts() for d in p.documents(BadRecords())]\n"
        "print(json.dumps(texts))"
    )
    folder = Path(__file__).parent
    found = run(program, tmp_path, folders=[folder])
    rows = reviews.rows("other", "train") + reviews.rows("other", "validation")
    assert sorted(found) == sorted(row["text"] for row in rows if row["language"] == "en")
    assert (tmp_path / "demix_reviews" / "other" / "1.2.0" / "dataset_info.json").exists()


def test_what_cannot_be_prepared_tells_why_and_how(tmp_path, capsys):
    with pytest.raises(DemixError) as error:
        TfdsSource("demix_unreachable", {"data_dir": str(tmp_path), "import": "reviews"}).parts()
    message = str(error.value)
    assert "the archive is offline" in message
    assert f"tfds build demix_unreachable:2.0.0 --data_dir={tmp_path} --imports=reviews" in message
    assert "\n" not in message
    assert f"not in {tmp_path} yet" in capsys.readouterr().out


def test_what_does_not_exist_is_named(roots):
    for address, options, message in [
        ("demix_revews/short", {}, "no dataset 'demix_revews'; did you mean 'demix_reviews'"),
        ("lm1bb", {}, "no dataset 'lm1bb'; did you mean 'lm1b'"),
        ("demix_reviews/shrt", {}, "no config 'shrt'; did you mean 'short'.*long, other, short"),
        ("c4/realnewslik", {}, "no config 'realnewslik'; did you mean 'realnewslike'"),
        ("demix_reviews/short:9.0.0", {}, r"no version 9.0.0 \(known: 1.2.0\)"),
        ("lm1b:0.0.1", {}, r"no version 0.0.1 \(known: 1.1.0\)"),
        ("demix_reviews/short:1", {}, "not of the form NAME"),
        ("demix_reviews/short", {"field": "txt"}, r"no field 'txt'; did you mean 'text'"),
        ("demix_reviews/short", {"field": "data"}, r"no field 'data'.*data/body \(string\)"),
        ("demix_reviews/short", {"field": "label"}, "'label' is int64 ClassLabel, not text"),
        ("demix_reviews/short", {"field": "tags"}, "'tags' is Sequence, not text"),
        ("demix_reviews/short", {"where": "lang:de"}, r"no field 'lang'.*language \(string\)"),
        ("demix_reviews/short", {"where": "tags:x"}, "'tags' is Sequence"),
        ("demix_reviews/short", {"where": "language"}, "not FIELD:VALUE"),
        ("demix_reviews/short", {"where": "label:god"}, "never 'god'; did you mean 'good'"),
        ("demix_reviews/short", {"where": "data/stars:x"}, "'data/stars' is a whole number"),
        ("demix_reviews/short", {"where": "ok:yes"}, "'ok' is true or false"),
        ("demix_reviews/short", {"train": "trian"}, "train=trian .*did you mean 'train'"),
        ("demix_reviews/short", {"train": "train[:999]"}, r"train=train\[:999\].*train with 203"),
        ("demix_reviews/short", {"train": "train[x]"}, r"train=train\[x\] is no split"),
        ("demix_reviews/short", {"train": "train[50:50]"}, r"train=train\[50:50\] is empty"),
        ("demix_reviews/short", {"test": "train[9:3]"}, r"test=train\[9:3\] is empty"),
        ("demix_reviews/short", {"valid": "train[:9]"}, r"valid=train\[:9\].*both .*train/0"),
        ("demix_reviews/short", {"train": "train[:9]+train[8:]"}, "both .*train/8"),
        ("demix_reviews/short", {"feild": "text"}, "unknown option 'feild'; did you mean 'field'"),
        ("demix_reviews/short", {"field": ["a", "b"]}, "'field' is given 2 times"),
        ("demix_reviews/short", {"train": ""}, "'train' is given without a value"),
        ("demix_reviews/short", {"import": "no_such_module"}, "'no_such_module' cannot be imp"),
        ("./nowhere", {"data_dir": ""}, "'data_dir' is given without a value"),
    ]:
        with case(address, options, message):
            place = {"data_dir": str(roots["array_record"])}
            with pytest.raises(DemixError, match=message) as error:
                TfdsSource(address, place | options).parts()
            assert "\n" not in str(error.value)
            assert address in str(error.value)


def test_a_folder_without_a_dataset_lists_those_inside(roots):
    root = roots["array_record"]
    with pytest.raises(DemixError, match=f"no dataset_info.json .*{root}/demix_reviews/long/1.2"):
        TfdsSource(str(root), {}).parts()
    with pytest.raises(DemixError, match="leave out the option data_dir"):
        TfdsSource(str(root), {"data_dir": "/elsewhere"}).parts()


def test_a_dataset_without_train_lists_its_splits(copied):
    folder = copied("long", "array_record")
    info = json.loads((folder / "dataset_info.json").read_text())
    info["splits"][0]["name"] = "everything"
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for path in folder.glob("*-train.*"):
        path.rename(folder / path.name.replace("-train.", "-everything."))
    with pytest.raises(DemixError, match=r"no split 'train'.*\(its splits: everything\)"):
        TfdsSource(str(folder), {}).parts()
    assert len(read(TfdsSource(str(folder), {"train": "everything"}))) == 400
