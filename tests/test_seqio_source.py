"""SeqIO tasks over files and TFDS datasets that are written here, read as domains."""

import hashlib
import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import reviews
from cases import case

from demix_jax.data.sources.base import BadRecords
from demix_jax.data.sources.seqio_source import SeqioSource
from demix_jax.errors import DemixError

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).parent.parent
COUNTS = (70, 90, 40)  # lines in the files of the train split
TASKS = r'''
"""SeqIO tasks over what lies beside this file."""

import functools
from pathlib import Path

import seqio
import tensorflow as tf

FOLDER = Path(__file__).parent
BYTES = seqio.Feature(seqio.ByteVocabulary(), add_eos=True)
lines = seqio.TextLineDataSource({"train": f"{FOLDER}/lines-*.txt"})
both = seqio.TextLineDataSource(
    {
        "train": f"{FOLDER}/lines-*.txt",
        "validation": f"{FOLDER}/held.txt",
        "extra": f"{FOLDER}/extra.txt",
        "nothing": f"{FOLDER}/nothing.txt",
        "nowhere": f"{FOLDER}/nowhere-*.txt",
    }
)
dataset = seqio.TfdsDataSource(
    "demix_reviews/short:1.2.0", tfds_data_dir=f"{FOLDER}/data", read_only=True
)


@seqio.map_over_dataset
def as_text(line):
    return {"text": line, "length": tf.strings.length(line), "half": 0.5, "short": True}


@seqio.map_over_dataset
def as_targets(line):
    return {"targets": line}


@seqio.map_over_dataset
def as_pair(line):
    return {"inputs": "", "targets": line}


@seqio.map_over_dataset(num_seeds=1)
def add_noise(example, seed):
    number = tf.random.stateless_uniform((), seed, 0, 1 << 30, tf.int32)
    return {**example, "text": example["text"] + tf.strings.as_string(number)}


@seqio.map_over_dataset
def break_some(example):
    bad = tf.strings.regex_full_match(example["text"], "(?s).*train [13]: .*")
    return {**example, "text": tf.where(bad, b"\xff" + example["text"], example["text"])}


def count(split, shuffle_files):
    return tf.data.Dataset.range(30).map(lambda i: {"text": tf.strings.as_string(i)})


def fail(dataset):
    raise RuntimeError("not\ntoday")


def add(name, source, *preprocessors, **features):
    seqio.TaskRegistry.add(
        name, source=source, preprocessors=preprocessors, output_features=features
    )


tokenize = seqio.preprocessors.tokenize
add("demix_lines", lines, as_text)
add("demix_both", both, as_text)
add("demix_targets", both, as_targets, tokenize, targets=BYTES)
add("demix_pair", both, as_pair, tokenize, inputs=BYTES, targets=BYTES)
add(
    "demix_tokens",
    both,
    as_targets,
    functools.partial(tokenize, copy_pretokenized=False),
    seqio.preprocessors.append_eos,
    targets=BYTES,
)
add("demix_dataset", dataset)
add("demix_broken", dataset, break_some)
add("demix_noise", lines, as_text, add_noise)
add("demix_count", seqio.FunctionDataSource(count, splits=["train"]))
add("demix_failing", lines, as_text, fail)
add("demix_raw", lines)
add("demix:colon", lines, as_text)
seqio.MixtureRegistry.add("demix_mixture", [("demix_targets", 1)])
'''


def train_lines():
    numbers = iter(range(sum(COUNTS)))
    return [
        [f"line {next(numbers)}: größer 日本 {'x' * (i % 9)}" for i in range(n)] for n in COUNTS
    ]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with texts, a TFDS dataset and the module of the tasks, which is imported here."""
    folder = tmp_path_factory.mktemp("tasks")
    for i, lines in enumerate(train_lines()):
        (folder / f"lines-{i}.txt").write_text("".join(f"{line}\n" for line in lines))
    (folder / "held.txt").write_text("".join(f"held {i}\n" for i in range(7)))
    (folder / "extra.txt").write_text("extra 0\nextra 1\n")
    (folder / "nothing.txt").write_text("")
    (folder / "demix_tasks.py").write_text(TASKS)
    (folder / "demix_wrong.py").write_text("raise RuntimeError('no such\\nluck')\n")
    reviews.build(folder / "data", "short", "tfrecord")
    sys.path.insert(0, str(folder))
    importlib.import_module("demix_tasks")
    yield folder
    sys.path.remove(str(folder))


def open_source(task, **options):
    return SeqioSource(f"demix_tasks:{task}", options)


def read(source, allowed=0):
    broken = BadRecords(allowed)
    return [document for part in source.parts() for document in part.documents(broken)]


def texts(documents, split):
    return [document.text for document in documents if document.split == split]


def hashed(text):
    share = int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
    return "train" if share < 0.9 else "valid" if share < 0.95 else "test"


def test_lines_of_all_files_come_in_order(folder):
    documents = read(open_source("demix_lines"))
    lines = [line for file in train_lines() for line in file]
    assert [document.text for document in documents] == lines
    assert [document.split for document in documents] == [hashed(line) for line in lines]
    assert {document.split for document in documents} == {"train", "valid", "test"}
    expected = [f"train/{i}/{j}" for i, count in enumerate(COUNTS) for j in range(count)]
    assert [document.id for document in documents] == expected


def test_each_file_is_a_part(folder):
    parts = open_source("demix_lines").parts()
    assert [part.size for part in parts] == [
        (folder / f"lines-{i}.txt").stat().st_size for i in range(3)
    ]
    for part, lines in zip(parts, train_lines(), strict=True):
        assert [document.text for document in part.documents(BadRecords())] == lines


def test_own_splits_are_used_and_missing_ones_come_by_hash(folder):
    documents = read(open_source("demix_both"))
    lines = [line for file in train_lines() for line in file]
    assert texts(documents, "valid") == [f"held {i}" for i in range(7)]
    assert texts(documents, "test") == [line for line in lines if hashed(line) == "test"]
    assert texts(documents, "train") == [line for line in lines if hashed(line) != "test"]


def test_splits_can_be_named(folder):
    documents = read(open_source("demix_both", train="validation", valid="extra", test="train"))
    assert texts(documents, "train") == [f"held {i}" for i in range(7)]
    assert texts(documents, "valid") == ["extra 0", "extra 1"]
    assert texts(documents, "test") == [line for file in train_lines() for line in file]


def test_a_tfds_dataset_is_read_as_it_was_generated(folder):
    source = open_source("demix_dataset")
    assert len(source.parts()) == 3 * 4
    documents = read(source)
    for ours, theirs in (("train", "train"), ("valid", "validation"), ("test", "test")):
        expected = [row["text"] for row in reviews.rows("short", theirs)]
        assert texts(documents, ours) == expected


def test_nested_fields_and_conditions(folder):
    where = ["language:de|fr", "ok:true", "data/stars:0|1|2"]
    documents = read(open_source("demix_dataset", field="data/body", where=where))
    rows = [
        row["data"]["body"]
        for row in reviews.rows("short", "train")
        if row["language"] in ("de", "fr") and row["ok"] and row["data"]["stars"] < 3
    ]
    assert 0 < len(rows) < 203
    assert texts(documents, "train") == rows


def test_the_text_of_a_tokenized_task(folder):
    for task, options in [
        ("demix_targets", {}),
        ("demix_targets", {"field": "targets"}),
        ("demix_pair", {"field": "targets_pretokenized"}),
        ("demix_tokens", {"field": "targets"}),
    ]:
        with case(task, options):
            parts = open_source(task, **options).parts()
            assert parts[0].text.is_tokens == (task == "demix_tokens")
            found = [
                [document.text for document in part.documents(BadRecords())] for part in parts[:3]
            ]
            assert found == train_lines()


def test_random_preprocessors_yield_the_same_each_time(folder):
    once, again = read(open_source("demix_noise")), read(open_source("demix_noise"))
    assert once == again
    assert len({document.text[-6:] for document in once}) > 150


def test_a_source_without_files_is_one_part(folder):
    (part,) = open_source("demix_count").parts()
    assert [document.text for document in part.documents(BadRecords())] == [
        str(i) for i in range(30)
    ]


def test_a_registered_task_needs_no_module(folder):
    assert read(SeqioSource("demix_lines", {})) == read(open_source("demix_lines"))
    assert read(SeqioSource("demix:colon", {})) == read(open_source("demix_lines"))


def test_another_process_reads_the_same(folder, tmp_path):
    sources = [open_source("demix_noise"), open_source("demix_tokens", field="targets")]
    sources += [open_source("demix_dataset", where="language:de")]
    (tmp_path / "parts").write_bytes(pickle.dumps([source.parts() for source in sources]))
    program = (
        "import json, pickle, sys\n"
        "from demix_jax.data.sources.base import BadRecords\n"
        "sources = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(json.dumps([[[d for d in p.documents(BadRecords())] for p in parts[::-1]][::-1]"
        " for parts in sources]))"
    )
    paths = os.pathsep.join(map(str, (REPOSITORY, folder)))
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "parts")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    for source, parts in zip(sources, json.loads(done.stdout.splitlines()[-1]), strict=True):
        found = [tuple(document) for part in parts for document in part]
        assert found == read(source)
        assert len(found) > 50


def test_texts_that_are_not_utf8_count_as_broken(folder):
    rows = [row["text"] for row in reviews.rows("short", "train")]
    found = texts(read(open_source("demix_broken"), allowed=2), "train")
    assert found == [text for i, text in enumerate(rows) if i not in (1, 3)]
    with pytest.raises(DemixError, match="train/0/3: invalid UTF-8 at byte 0 .*1 bad"):
        read(open_source("demix_broken"), allowed=1)


def test_fingerprint_and_stamp(folder):
    path, plain = folder / "extra.txt", {"test": "extra"}
    here = open_source("demix_both", **plain)
    before = here.fingerprint(), here.cheap_fingerprint()
    others = [
        open_source("demix_both", **plain, version="2"),
        open_source("demix_both", **plain, where="length:7"),
        open_source("demix_both", **plain, field="text"),
        open_source("demix_both", test="validation", valid="extra"),
        open_source("demix_both"),
        open_source("demix_targets", **plain),
    ]
    assert len({source.fingerprint() for source in (here, *others)}) == 7
    os.utime(path, (1, 1))
    touched = open_source("demix_both", **plain)
    assert touched.fingerprint() == before[0]
    assert touched.cheap_fingerprint() != before[1]
    text = path.read_text()
    path.write_text(text + "extra 2\n")
    longer = open_source("demix_both", **plain).fingerprint()
    path.write_text(text)
    assert longer != before[0]


def test_what_does_not_exist_is_named(folder):
    for address, options, message in [
        ("demix_tasks:demix_lins", {}, "no task 'demix_lins' is registered; did you mean 'demix_l"),
        ("demix_lins", {}, "did you mean 'demix_lines'.*; name the module that registers it"),
        ("no.such:demix_lines", {}, "module 'no.such' cannot be imported .*PYTHONPATH"),
        ("demix_wrong:demix_lines", {}, r"'demix_wrong' cannot .*RuntimeError: no such luck"),
        ("demix_tasks:demix_mixture", {}, "is a mixture"),
        ("demix_tasks:demix_lines", {"field": "txt"}, r"no field 'txt'; did you mean 'text'"),
        ("demix_tasks:demix_lines", {"field": "length"}, r"'length' is int32, neither .*\(string"),
        ("demix_tasks:demix_dataset", {"field": "tags"}, r"'tags' is string\[\], neither"),
        ("demix_tasks:demix_pair", {}, "several fields of text; .*inputs_pretokenized"),
        ("demix_tasks:demix_tokens", {}, r"no field of text; .*targets \(int32\[\]\)"),
        ("demix_tasks:demix_dataset", {"where": "tags:x"}, r"'tags' is string\[\]"),
        ("demix_tasks:demix_lines", {"where": "leng:1"}, "no field 'leng'; did you mean 'length'"),
        ("demix_tasks:demix_lines", {"where": "length:x"}, "'length' is a whole number"),
        ("demix_tasks:demix_lines", {"where": "half:x"}, "'half' is a number"),
        ("demix_tasks:demix_lines", {"where": "short:0"}, "'short' is true or false"),
        (
            "demix_tasks:demix_both",
            {"valid": "held"},
            r"valid=held is no split .*validation, extra",
        ),
        ("demix_tasks:demix_both", {"test": "train"}, "train and test are both the split 'train'"),
        ("demix_tasks:demix_both", {"test": "nothing"}, "test=nothing is empty"),
        ("demix_tasks:demix_both", {"test": "nowhere"}, "test=nowhere is empty"),
        ("demix_tasks:demix_failing", {}, "split 'train' cannot be opened .not today"),
        ("demix_tasks:demix_raw", {}, "demix_raw: split 'train' cannot be opened"),
        ("demix_tasks:demix_lines", {"feild": "a"}, "unknown option 'feild'; did you mean 'field'"),
        ("demix_tasks:demix_lines", {"data_dir": "a"}, "unknown option 'data_dir'.*version"),
    ]:
        with case(address, options, message):
            with pytest.raises(DemixError, match=message) as error:
                SeqioSource(address, options).parts()
            assert "\n" not in str(error.value)
            assert address in str(error.value)


def test_a_file_that_is_gone_is_named(folder):
    path = folder / "extra.txt"
    source = open_source("demix_both", test="extra")
    (part,) = (part for part in source.parts() if part.split == "test")
    text = path.read_text()
    path.unlink()
    try:
        with pytest.raises(DemixError, match="split 'extra' cannot be read .*extra.txt"):
            list(part.documents(BadRecords()))
        with pytest.raises(DemixError, match="extra.txt cannot be read"):
            open_source("demix_both", test="extra").parts()
    finally:
        path.write_text(text)
