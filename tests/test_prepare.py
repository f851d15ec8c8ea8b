"""`demix prepare`: what is on disk, and what a second, changed or interrupted run does with it.

Nearly every test reads text through SeqIO, which imports TensorFlow: ten seconds once a process.
"""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

from demix_jax.batches import Prepared, training_batches
from demix_jax.config import Config, DataConfig, ModelConfig, from_dict, to_dict
from demix_jax.domains import hash_split
from demix_jax.errors import DemixError
from demix_jax.prepare import prepare

SPLITS = ("train", "valid", "test")
ROOT = Path(__file__).parent.parent
EOD = 256

BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tensorflow", "seqio", "tensorflow_datasets"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""
PREPARE = """
import json, sys
from demix_jax.config import from_dict
from demix_jax.prepare import prepare
prepare(from_dict(json.loads(sys.argv[1])))
"""


def split_texts(seed: int, count: int = 12) -> dict[str, list[str]]:
    """Texts of each split; hard characters, and more of them than one batch holds for train."""
    words = ["alpha", "béta", "γ\n", "\tdelta", "👍", "  ", "<eod>", "\0"]
    rng = np.random.default_rng(seed)
    counts = {"train": count, "valid": 3, "test": 4}
    return {
        split: [f"{seed}.{i} " + " ".join(rng.choice(words, rng.integers(1, 30))) for i in range(n)]
        for split, n in counts.items()
    }


def write_domain(folder: Path, name: str, texts: dict[str, list[str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "split": split} for split in texts for text in texts[split]]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_config(tmp_path: Path, context: int = 8, **data: Any) -> Config:
    settings = {"tokenizer": "bytes", "dir": str(tmp_path / "data")} | data
    return Config(
        data=DataConfig(sources=(str(tmp_path / "texts"),), **settings),
        model=ModelConfig(context=context),
    ).validate()


def spell(texts: list[str]) -> list[int]:
    """<eod> document <eod> document <eod>, in bytes."""
    ids = [EOD]
    for text in texts:
        ids += [*text.encode(), EOD]
    return ids


def read_tokens(folder: Path, split: str, dtype: str = "uint16") -> list[int]:
    return np.fromfile(folder / f"{split}.tokens", dtype).tolist()


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of change of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def python(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def as_json(config: Config) -> str:
    return json.dumps(to_dict(config))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    """Two prepared domains, the first longer than a batch of documents, and what was returned."""
    tmp_path = tmp_path_factory.mktemp("made")
    write_domain(tmp_path / "texts", "law", split_texts(0, count=600))
    write_domain(tmp_path / "texts", "med", split_texts(1))
    return tmp_path / "data", prepare(make_config(tmp_path))


@pytest.fixture
def two(tmp_path: Path) -> Config:
    """Two small domains, prepared."""
    for seed, name in enumerate(("law", "med")):
        write_domain(tmp_path / "texts", name, split_texts(seed))
    config = make_config(tmp_path)
    prepare(config)
    return config


pytestmark = pytest.mark.slow

DOMAIN_SPLITS = [(name, split) for name in ("law", "med") for split in SPLITS]


def texts_of(name: str, split: str) -> list[str]:
    return (split_texts(0, count=600) if name == "law" else split_texts(1))[split]


@pytest.mark.parametrize(("name", "split"), DOMAIN_SPLITS)
def test_documents_lie_between_eods(made: tuple[Path, dict], name: str, split: str) -> None:
    assert read_tokens(made[0] / name, split) == spell(texts_of(name, split))


@pytest.mark.parametrize(("name", "split"), DOMAIN_SPLITS)
def test_index_has_the_offset_and_bytes_of_each_document(
    made: tuple[Path, dict], name: str, split: str
) -> None:
    texts = texts_of(name, split)
    sizes = [len(text.encode()) for text in texts]
    offsets = [len(spell(texts[:i])) - 1 for i in range(len(texts))]
    index = np.load(made[0] / name / f"{split}.index.npy")
    assert index.dtype == np.int64
    assert index.tolist() == [list(row) for row in zip(offsets, sizes, strict=True)]


@pytest.mark.parametrize(("name", "split"), DOMAIN_SPLITS)
def test_meta_has_counts_and_hash(made: tuple[Path, dict], name: str, split: str) -> None:
    texts = texts_of(name, split)
    content = (made[0] / name / f"{split}.tokens").read_bytes()
    assert json.loads((made[0] / name / "meta.json").read_text())["splits"][split] == {
        "documents": len(texts),
        "tokens": len(spell(texts)),
        "bytes": sum(len(text.encode()) for text in texts),
        "dtype": "uint16",
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def test_metas_are_returned(made: tuple[Path, dict]) -> None:
    folder, metas = made
    assert metas == {n: json.loads((folder / n / "meta.json").read_text()) for n in ("law", "med")}


def test_nothing_else_is_left_in_the_folder(made: tuple[Path, dict]) -> None:
    files = {f"{split}.{end}" for split in SPLITS for end in ("tokens", "index.npy")}
    assert {path.name for path in made[0].iterdir()} == {"data.json", "tokenizer", "law", "med"}
    assert {path.name for path in (made[0] / "law").iterdir()} == files | {"meta.json"}


def test_table_counts_every_domain(two: Config, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(two)
    printed = capsys.readouterr().out
    for seed, name in enumerate(("law", "med")):
        texts = split_texts(seed)
        tokens = {split: len(spell(texts[split])) for split in SPLITS}
        sizes = [len(text.encode()) for split in SPLITS for text in texts[split]]
        row = next(line.split() for line in printed.splitlines() if line.startswith(name))
        total = sum(tokens.values())
        assert row == [
            *(name, "train", str(len(sizes)), f"{total:,}", f"{sum(sizes) / total:.2f}"),
            f"{tokens['valid']:,}/{tokens['test']:,}",
        ]


def test_documents_without_declared_split_are_split_by_hash(tmp_path: Path) -> None:
    texts = [f"document {i}" for i in range(300)]
    (tmp_path / "texts").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts" / "law.jsonl").write_text(lines)
    prepare(make_config(tmp_path))
    for split in SPLITS:
        expected = spell([text for text in texts if hash_split(text) == split])
        assert read_tokens(tmp_path / "data" / "law", split) == expected


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    texts = {split: ["", f"some text of {split}", ""] for split in SPLITS}
    write_domain(tmp_path / "texts", "law", texts)
    metas = prepare(make_config(tmp_path))
    assert metas["law"]["splits"]["train"]["documents"] == 1
    assert read_tokens(tmp_path / "data" / "law", "train") == spell(["some text of train"])


def test_sentencepiece_tokens_are_the_librarys(tmp_path: Path) -> None:
    texts = {name: split_texts(seed, count=300) for seed, name in enumerate(("law", "med"))}
    for name in texts:
        write_domain(tmp_path / "texts", name, texts[name])
    prepare(make_config(tmp_path, tokenizer="sentencepiece", vocab_size=310))
    model = str(tmp_path / "data" / "tokenizer" / "tokenizer.model")
    library = sentencepiece.SentencePieceProcessor(model_file=model)
    for name in texts:
        for split in SPLITS:
            expected = [library.eos_id()]
            for text in texts[name][split]:
                expected += [*library.encode(text), library.eos_id()]
            assert read_tokens(tmp_path / "data" / name, split) == expected


def test_sentencepiece_is_not_trained_on_heldout_or_novel_text(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice([*"abcdef"], 4)) for _ in range(100)]
    plain = {split: [" ".join(rng.choice(words, 50)) for _ in range(20)] for split in SPLITS}
    write_domain(tmp_path / "texts", "law", plain | {"valid": ["xyz " * 500], "test": ["xyz"]})
    write_domain(tmp_path / "texts", "news", plain | {"train": ["xyz " * 500]})
    prepare(
        make_config(tmp_path, tokenizer="sentencepiece", vocab_size=300, novel_domains=("news",))
    )
    model = str(tmp_path / "data" / "tokenizer" / "tokenizer.model")
    library = sentencepiece.SentencePieceProcessor(model_file=model)
    pieces = "".join(library.id_to_piece(i) for i in range(259, library.get_piece_size()))
    assert "a" in pieces
    assert not set("xyz") & set(pieces)


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_ids_have_the_width_that_the_vocabulary_needs(
    tmp_path: Path, size: int, dtype: str
) -> None:
    vocabulary = {f"w{i}": i for i in range(size - 1)} | {"<eos>": size - 1}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.save(str(tmp_path / "words.json"))
    write_domain(tmp_path / "texts", "law", {s: [f"w1 w{size - 2} w7 " * 5] for s in SPLITS})
    metas = prepare(make_config(tmp_path, tokenizer=str(tmp_path / "words.json")))
    assert metas["law"]["splits"]["train"]["dtype"] == dtype
    expected = [size - 1, *[1, size - 2, 7] * 5, size - 1]
    assert read_tokens(tmp_path / "data" / "law", "train", dtype) == expected
    assert Prepared(tmp_path / "data").tokens("law", "train").tolist() == expected


def test_second_run_rebuilds_nothing(two: Config) -> None:
    before = stamps(Path(two.data.dir))
    prepare(two)
    after = stamps(Path(two.data.dir))
    assert before.pop("data.json")
    assert after.pop("data.json")
    assert before == after


def test_second_run_needs_no_tensorflow(two: Config) -> None:
    done = python(BLOCKER + PREPARE, as_json(two))
    assert done.returncode == 0, done.stderr
    assert "prepared data: " in done.stdout


def test_first_run_without_tensorflow_says_what_to_install(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0))
    done = python(BLOCKER + PREPARE, as_json(make_config(tmp_path)))
    assert done.returncode != 0
    assert "pip install 'demix_jax[data]'" in done.stderr.splitlines()[-1]


def test_prepared_data_are_read_without_tensorflow(two: Config) -> None:
    script = """
from demix_jax.batches import Prepared, heldout_sequences, training_batches
config = from_dict(json.loads(sys.argv[1]))
data = Prepared(config.data.dir)
next(training_batches(config, data, data.train, (None, None)))
heldout_sequences(data, "law", "test", 8, 0, None)
"""
    imports = "import json, sys\nfrom demix_jax.config import from_dict\n"
    done = python(BLOCKER + imports + script, as_json(two))
    assert done.returncode == 0, done.stderr


def test_changed_file_rebuilds_its_domain_only(two: Config, tmp_path: Path) -> None:
    before = stamps(tmp_path / "data")
    write_domain(tmp_path / "texts", "med", split_texts(7))
    prepare(two)
    after = stamps(tmp_path / "data")
    assert {n: s for n, s in after.items() if n.startswith(("law", "tokenizer"))} == {
        n: s for n, s in before.items() if n.startswith(("law", "tokenizer"))
    }
    assert read_tokens(tmp_path / "data" / "med", "train") == spell(split_texts(7)["train"])


def test_new_domain_joins_those_prepared(two: Config, tmp_path: Path) -> None:
    before = stamps(tmp_path / "data")
    write_domain(tmp_path / "texts", "chat", split_texts(3))
    prepare(two)
    after = stamps(tmp_path / "data")
    kept = {name: stamp for name, stamp in before.items() if name != "data.json"}
    assert {name: after[name] for name in kept} == kept
    assert Prepared(tmp_path / "data").train == ("chat", "law", "med")


def test_text_file_moved_to_another_split_is_noticed(tmp_path: Path) -> None:
    for split in SPLITS:
        (tmp_path / "texts" / "law" / split).mkdir(parents=True)
        own = "z.txt" if split == "valid" else "a.txt"
        (tmp_path / "texts" / "law" / split / own).write_text(f"some text of {split}")
    (tmp_path / "texts" / "law" / "train" / "n.txt").write_text("moved")
    config = make_config(tmp_path)
    prepare(config)
    (tmp_path / "texts" / "law" / "train" / "n.txt").rename(
        tmp_path / "texts" / "law" / "valid" / "n.txt"
    )
    prepare(config)
    expected = spell(["moved", "some text of valid"])
    assert read_tokens(tmp_path / "data" / "law", "valid") == expected


def test_folders_of_an_interrupted_run_are_replaced(two: Config, tmp_path: Path) -> None:
    whole = {name: (tmp_path / "data" / name).read_bytes() for name in stamps(tmp_path / "data")}
    for name in (".law.partial", ".law.old", ".med.partial"):
        (tmp_path / "data" / name / "deep").mkdir(parents=True)
        (tmp_path / "data" / name / "deep" / "train.tokens").write_bytes(b"junk")
        (tmp_path / "data" / name / "train.tokens").write_bytes(b"junk")
    (tmp_path / "data" / "law" / "meta.json").unlink()
    (tmp_path / "data" / "med" / "train.tokens").unlink()
    (tmp_path / "data" / "med" / "meta.json").write_text('{"format": 0}')
    prepare(two)
    found = {name: (tmp_path / "data" / name).read_bytes() for name in stamps(tmp_path / "data")}
    assert found == whole


def test_killed_run_is_repaired_by_the_same_command(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0))
    slow = split_texts(1, count=15_000)
    write_domain(tmp_path / "texts", "med", slow)
    config = make_config(tmp_path)
    data = tmp_path / "data"
    command = [sys.executable, "-c", PREPARE, as_json(config)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    half = data / ".med.partial" / "train.tokens"
    deadline = time.monotonic() + 120
    while not (half.exists() and half.stat().st_size) and time.monotonic() < deadline:
        assert run.poll() is None
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not (data / "med").exists()
    assert not (data / "data.json").exists()
    before = stamps(data / "law")
    prepare(config)
    assert stamps(data / "law") == before
    assert read_tokens(data / "med", "train") == spell(slow["train"])
    assert sorted(os.listdir(data)) == ["data.json", "law", "med", "tokenizer"]


def test_data_of_a_run_that_did_not_end_are_not_offered(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0))
    write_domain(tmp_path / "texts", "med", {split: [] for split in SPLITS})
    with pytest.raises(DemixError):
        prepare(make_config(tmp_path))
    with pytest.raises(DemixError, match="holds no prepared data; run `demix prepare`"):
        Prepared(tmp_path / "data")


def test_another_tokenizer_in_the_same_folder_is_refused(two: Config) -> None:
    before = stamps(Path(two.data.dir))
    other = dataclasses.replace(two.data, tokenizer="sentencepiece", vocab_size=300)
    with pytest.raises(DemixError, match="was prepared with .*'bytes'.* asked for .*300.*data_dir"):
        prepare(dataclasses.replace(two, data=other))
    assert stamps(Path(two.data.dir)) == before


def test_another_vocabulary_size_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0, count=100))
    prepare(make_config(tmp_path, tokenizer="sentencepiece", vocab_size=300))
    with pytest.raises(DemixError, match="300.*asked for .*301"):
        prepare(make_config(tmp_path, tokenizer="sentencepiece", vocab_size=301))


def test_tokenizer_file_replaced_by_another_is_refused(tmp_path: Path) -> None:
    def write_words(words: str) -> None:
        vocabulary = {word: i for i, word in enumerate(words.split())}
        model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
        model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        model.save(str(tmp_path / "words.json"))

    write_domain(tmp_path / "texts", "law", {split: ["a b c " * 10] for split in SPLITS})
    config = make_config(tmp_path, tokenizer=str(tmp_path / "words.json"))
    write_words("a b c")
    prepare(config)
    write_words("c b a")
    with pytest.raises(DemixError, match="tokenizer"):
        prepare(config)


def test_empty_domain_is_an_error_with_counts(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", {split: [] for split in SPLITS})
    message = "'law' is too small: .* 0 tokens.*train: 0 documents, valid: 0 documents, test: 0"
    with pytest.raises(DemixError, match=message):
        prepare(make_config(tmp_path))


@pytest.mark.parametrize("split", ["valid", "test"])
def test_domain_without_heldout_text_is_an_error(tmp_path: Path, split: str) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0) | {split: [""]})
    with pytest.raises(DemixError, match=rf"split '{split}' has 0 tokens.*train: 12 documents"):
        prepare(make_config(tmp_path))


def test_domain_with_less_than_one_sequence_is_an_error(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0) | {"train": ["x" * 7]})
    with pytest.raises(DemixError, match="'train' has 9 tokens, needs at least 10"):
        prepare(make_config(tmp_path, context=9))


def test_domain_with_exactly_one_sequence_can_be_trained_on(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0) | {"train": ["x" * 8]})
    config = make_config(tmp_path, context=9)
    prepare(config)
    data = Prepared(tmp_path / "data")
    batch = next(training_batches(config, data, data.train, (None,)))
    assert batch.tokens[0, 0].tolist() == spell(["x" * 8])


def test_novel_domain_is_listed_as_novel(tmp_path: Path) -> None:
    for seed, name in enumerate(("law", "med", "news")):
        write_domain(tmp_path / "texts", name, split_texts(seed))
    prepare(make_config(tmp_path, novel_domains=("news",)))
    data = Prepared(tmp_path / "data")
    assert (data.train, data.novel) == (("law", "med"), ("news",))
    assert data.tokens("news", "test").tolist() == spell(split_texts(2)["test"])


def test_novel_domain_needs_no_training_text(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0))
    write_domain(tmp_path / "texts", "news", split_texts(1) | {"train": []})
    prepare(make_config(tmp_path, novel_domains=("news",)))
    data = Prepared(tmp_path / "data")
    assert data.tokens("news", "train").tolist() == []
    assert data.index("news", "train").shape == (0, 2)


def test_domain_can_become_novel_without_rebuilding(two: Config, tmp_path: Path) -> None:
    before = stamps(tmp_path / "data")
    prepare(dataclasses.replace(two, data=dataclasses.replace(two.data, novel_domains=("med",))))
    after = stamps(tmp_path / "data")
    assert {k: v for k, v in before.items() if k != "data.json"} == {
        k: v for k, v in after.items() if k != "data.json"
    }
    assert Prepared(tmp_path / "data").novel == ("med",)


def test_domain_called_tokenizer_does_not_replace_the_tokenizer(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "tokenizer", split_texts(0))
    with pytest.raises(DemixError, match="tokenizer"):
        prepare(make_config(tmp_path))


@pytest.mark.parametrize(
    "tokenizer",
    [
        "bytes",
        "sentencepiece",
    ],
)
def test_broken_text_is_named_by_file_and_line(tmp_path: Path, tokenizer: str) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0, count=100))
    with (tmp_path / "texts" / "law.jsonl").open("a") as file:
        file.write("{\n")
    config = make_config(tmp_path, tokenizer=tokenizer, vocab_size=300)
    with pytest.raises(DemixError, match=r"^/\S*law\.jsonl:108: broken JSON"):
        prepare(config)


def test_bad_lines_are_skipped_when_allowed(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0))
    with (tmp_path / "texts" / "law.jsonl").open("a") as file:
        file.write("{\n[]\n")
    prepare(make_config(tmp_path, skip_bad_lines=2))
    expected = spell(split_texts(0)["train"])
    assert read_tokens(tmp_path / "data" / "law", "train") == expected


def test_config_read_back_prepares_the_same(two: Config) -> None:
    before = stamps(Path(two.data.dir) / "law")
    prepare(from_dict(json.loads(as_json(two))))
    assert stamps(Path(two.data.dir) / "law") == before
