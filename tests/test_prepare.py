"""`demix prepare`: what is on disk, and what a second, changed or interrupted run does with it."""

import hashlib
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from cases import case, folders
from preparing import (
    as_json,
    build_of,
    changed,
    here,
    index_rows,
    make_config,
    prepare_parts,
    prepare_two,
    read_tokens,
    spell,
    split_texts,
    stamps,
    write_domain,
    write_words,
)

from demix_jax.config.schema import Config
from demix_jax.data.dataset import PreparedData
from demix_jax.data.loader import PackedSequences
from demix_jax.data.sources.base import SPLITS, hash_split
from demix_jax.data.token_files import INDEX
from demix_jax.errors import DemixError
from demix_jax.typed_files import unseal

ROOT = Path(__file__).parent.parent
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        heavy = ("tensorflow", "seqio", "tensorflow_datasets", "apache_beam", "jax")
        if name.partition(".")[0] in heavy:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocker())
"""
PREPARE = """
import json, sys
from demix_jax.config.serialization import from_dict
from demix_jax.data.prepare.prepare import prepare
prepare(from_dict(json.loads(sys.argv[1])))
"""


def python(script: str, *args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict]]:
    """Two prepared domains, the first longer than a batch of documents, and what was returned."""
    tmp_path = tmp_path_factory.mktemp("made")
    write_domain(tmp_path / "texts", "law", split_texts(0, count=600))
    write_domain(tmp_path / "texts", "med", split_texts(1))
    return tmp_path / "data", here(make_config(tmp_path))


@pytest.fixture
def two(tmp_path: Path) -> Config:
    return prepare_two(tmp_path)


@pytest.fixture
def parts(tmp_path: Path) -> Config:
    return prepare_parts(tmp_path)


DOMAIN_SPLITS = [(name, split) for name in ("law", "med") for split in SPLITS]


def texts_of(name: str, split: str) -> list[str]:
    return (split_texts(0, count=600) if name == "law" else split_texts(1))[split]


def test_documents_lie_between_eods(made: tuple[Path, dict]) -> None:
    for name, split in DOMAIN_SPLITS:
        with case(name, split):
            assert read_tokens(made[0] / name, split) == spell(texts_of(name, split))


def test_index_has_the_offset_bytes_and_key_of_each_document(made: tuple[Path, dict]) -> None:
    for name, split in DOMAIN_SPLITS:
        with case(name, split):
            index = np.fromfile(build_of(made[0] / name) / f"{split}-00000.index", INDEX)
            assert index.tolist() == index_rows(texts_of(name, split))


def test_meta_and_part_have_counts_and_hashes(made: tuple[Path, dict]) -> None:
    for name, split in DOMAIN_SPLITS:
        with case(name, split):
            texts = texts_of(name, split)
            build = build_of(made[0] / name)
            content = (build / f"{split}-00000.tokens").read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            counts = {
                "documents": len(texts),
                "tokens": len(spell(texts)),
                "bytes": sum(len(text.encode()) for text in texts),
            }
            assert json.loads((build / "00000.json").read_text())[split] == counts | {
                "sha256": digest,
                "crc32": [
                    zlib.crc32(content[i : i + 16_384]) for i in range(0, len(content), 16_384)
                ],
                "index_crc32": zlib.crc32((build / f"{split}-00000.index").read_bytes()),
            }
            meta = json.loads((made[0] / name / "meta.json").read_text())
            assert meta["dtype"] == "uint16"
            assert meta["splits"][split] == counts | {
                "sha256": hashlib.sha256(digest.encode()).hexdigest(),
                "parts": [len(spell(texts))],
            }


def test_counts_of_all_parts_are_added_up(parts: Config) -> None:
    texts = split_texts(0, count=60)
    (meta,) = here(parts).values()
    assert len(meta["splits"]["train"]["parts"]) > 5
    for split in SPLITS:
        counts = meta["splits"][split]
        assert counts["documents"] == len(texts[split])
        assert counts["bytes"] == sum(len(text.encode()) for text in texts[split])
        stream = PreparedData(parts.data.dir).tokens("law", split)
        assert counts["tokens"] == len(stream) == len(spell(texts[split]))


def test_metas_are_returned(made: tuple[Path, dict]) -> None:
    folder, metas = made
    texts = {n: (folder / n / "meta.json").read_text() for n in ("law", "med")}
    assert metas == {n: unseal(json.loads(text)) for n, text in texts.items()}


def test_nothing_else_is_left_in_the_folder(made: tuple[Path, dict]) -> None:
    files = {f"{split}-00000.{end}" for split in SPLITS for end in ("tokens", "index")}
    assert {path.name for path in made[0].iterdir()} == {
        ".lock",
        "data.json",
        "tokenizer",
        "law",
        "med",
    }
    build = build_of(made[0] / "law")
    assert {path.name for path in (made[0] / "law").iterdir()} == {build.name, "meta.json"}
    assert {path.name for path in build.iterdir()} == files | {"00000.json"}


def test_table_counts_every_domain(two: Config, capsys: pytest.CaptureFixture[str]) -> None:
    here(two)
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
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "texts" / "law.jsonl").write_text(rows)
    here(make_config(tmp_path))
    for split in SPLITS:
        expected = spell([text for text in texts if hash_split(text) == split])
        assert read_tokens(tmp_path / "data" / "law", split) == expected


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    texts = {split: ["", f"some text of {split}", ""] for split in SPLITS}
    write_domain(tmp_path / "texts", "law", texts)
    metas = here(make_config(tmp_path))
    assert metas["law"]["splits"]["train"]["documents"] == 1
    assert read_tokens(tmp_path / "data" / "law", "train") == spell(["some text of train"])


@pytest.mark.slow
def test_parts_of_any_size_are_the_same_text(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for part_bytes in [1, 97, 1000, 20_000, 10**9]:
        with case(part_bytes):
            folder = next(fresh)
            texts = split_texts(0, count=200)
            write_domain(folder / "texts", "law", texts)
            metas = here(make_config(folder, part_bytes=part_bytes))
            data = PreparedData(folder / "data")
            for split in SPLITS:
                assert data.tokens("law", split)[:].tolist() == spell(texts[split])
                assert data.index("law", split).tolist() == [
                    list(row[:2]) for row in index_rows(texts[split])
                ]
            size = (folder / "texts" / "law.jsonl").stat().st_size
            count = len(metas["law"]["splits"]["train"]["parts"])
            assert count == -(-size // max(part_bytes, -(-size // 512)))


def test_sentencepiece_tokens_are_the_librarys(tmp_path: Path) -> None:
    texts = {name: split_texts(seed, count=300) for seed, name in enumerate(("law", "med"))}
    for name in texts:
        write_domain(tmp_path / "texts", name, texts[name])
    here(make_config(tmp_path, tokenizer="sentencepiece", vocab_size=310))
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
    here(make_config(tmp_path, tokenizer="sentencepiece", vocab_size=300, novel_domains=("news",)))
    model = str(tmp_path / "data" / "tokenizer" / "tokenizer.model")
    library = sentencepiece.SentencePieceProcessor(model_file=model)
    pieces = "".join(library.id_to_piece(i) for i in range(259, library.get_piece_size()))
    assert "a" in pieces
    assert not set("xyz") & set(pieces)


def test_ids_have_the_width_that_the_vocabulary_needs(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for size, dtype in [(65_536, "uint16"), (65_537, "uint32")]:
        with case(size, dtype):
            folder = next(fresh)
            write_words(folder / "words.json", [f"w{i}" for i in range(size - 1)])
            write_domain(folder / "texts", "law", {s: [f"w1 w{size - 2} w7 " * 5] for s in SPLITS})
            metas = here(make_config(folder, tokenizer=str(folder / "words.json")))
            assert metas["law"]["dtype"] == dtype
            expected = [size - 1, *[1, size - 2, 7] * 5, size - 1]
            assert read_tokens(folder / "data" / "law", "train", dtype) == expected
            assert PreparedData(folder / "data").tokens("law", "train")[:].tolist() == expected


def test_text_files_need_no_other_libraries(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0))
    config = make_config(tmp_path)
    for _ in range(2):
        done = python(BLOCKER + PREPARE, as_json(config))
        assert done.returncode == 0, done.stderr
        assert "prepared data: " in done.stdout
    assert read_tokens(tmp_path / "data" / "law", "train") == spell(split_texts(0)["train"])


@pytest.mark.slow
def test_prepared_data_are_read_without_tensorflow(two: Config) -> None:
    script = """
from demix_jax.data.loader import PackedSequences, heldout_sequences
from demix_jax.data.dataset import PreparedData
data = PreparedData(sys.argv[1])
PackedSequences(data.tokens("law", "train"), 0, 8, None)[0]
heldout_sequences(data, "law", "test", 8, 0, None)
"""
    done = python(BLOCKER.replace(', "jax"', "") + script, two.data.dir)
    assert done.returncode == 0, done.stderr


def test_data_of_a_run_that_did_not_end_are_not_offered(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0))
    write_domain(tmp_path / "texts", "med", {split: [] for split in SPLITS})
    with pytest.raises(DemixError):
        here(make_config(tmp_path))
    with pytest.raises(DemixError, match="holds no prepared data; run `demix prepare`"):
        PreparedData(tmp_path / "data")


def test_another_tokenizer_in_the_same_folder_is_refused(two: Config) -> None:
    before = stamps(Path(two.data.dir))
    with pytest.raises(DemixError, match="was prepared with .*'bytes'.* asked for .*300.*data_dir"):
        here(changed(two, tokenizer="sentencepiece", vocab_size=300))
    assert stamps(Path(two.data.dir)) == before


def test_another_vocabulary_size_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0, count=100))
    here(make_config(tmp_path, tokenizer="sentencepiece", vocab_size=300))
    with pytest.raises(DemixError, match="300.*asked for .*301"):
        here(make_config(tmp_path, tokenizer="sentencepiece", vocab_size=301))


def test_tokenizer_file_replaced_by_another_is_refused(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", {split: ["a b c " * 10] for split in SPLITS})
    config = make_config(tmp_path, tokenizer=str(tmp_path / "words.json"))
    write_words(tmp_path / "words.json", "abc")
    here(config)
    write_words(tmp_path / "words.json", "cba")
    with pytest.raises(DemixError, match="tokenizer"):
        here(config)


def test_same_tokenizer_is_the_same_wherever_its_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_domain(tmp_path / "texts", "law", {split: ["a b c " * 10] for split in SPLITS})
    write_words(tmp_path / "words.json", "abc")
    config = make_config(tmp_path, tokenizer=str(tmp_path / "words.json"))
    here(config)
    before = stamps(tmp_path / "data")
    (tmp_path / "words.json").rename(tmp_path / "moved.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "moved.json")
    monkeypatch.chdir(tmp_path)
    for place in (
        "moved.json",
        "./moved.json",
        "texts/../link.json",
        "data/tokenizer/tokenizer.json",
    ):
        with case(place):
            here(changed(config, tokenizer=place))
            assert stamps(tmp_path / "data") == before


def test_share_of_text_that_a_tokenizer_gives_back_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here 2 of 10 characters of one domain, or none, are unknown and left out."""
    whole = {split: [f"abcd{i % 10:04}" for i in range(300)] for split in SPLITS}
    part = {split: [f"{text}漢字" for text in texts] for split, texts in whole.items()}
    write_domain(tmp_path / "texts", "law", whole)
    write_domain(tmp_path / "texts", "med", part)
    pieces = {piece: i for i, piece in enumerate("abcd0123456789")}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(pieces, []))
    model.decoder = tokenizers.decoders.Fuse()
    model.save(str(tmp_path / "drops.json"))
    metas = here(make_config(tmp_path, tokenizer=str(tmp_path / "drops.json"), part_bytes=20_000))
    data, printed = PreparedData(tmp_path / "data"), capsys.readouterr().out
    assert metas["law"]["round_trip"]["documents"] > 256
    assert data.round_trip("law").share == 1
    assert data.round_trip("med").share == 0.8
    assert data.round_trip("med").unchanged == 0
    warnings = [line for line in printed.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert re.search(r"gives back 80.00% of the characters of 'med' .* do not count$", warnings[0])


def test_what_lies_beside_data_is_named_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_domain(tmp_path / "texts" / "law", "a", split_texts(0))
    write_domain(tmp_path / "texts", "med", split_texts(0))
    for name in ("README.md", "_SUCCESS", "Thumbs.db"):
        (tmp_path / "texts" / "law" / name).write_text("left here")
        (tmp_path / "texts" / name).write_text("left here")
    metas = here(make_config(tmp_path))
    assert metas["law"]["splits"] == metas["med"]["splits"]
    named = "without 3 files that are no data: 'README.md', 'Thumbs.db', '_SUCCESS'"
    assert named in capsys.readouterr().out


def test_empty_domain_is_an_error_with_counts(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", {split: [] for split in SPLITS})
    message = "'law' is too small: .* 0 tokens.*train: 0 documents, valid: 0 documents, test: 0"
    with pytest.raises(DemixError, match=message):
        here(make_config(tmp_path))


def test_domain_without_heldout_text_is_an_error(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for split in ["valid", "test"]:
        with case(split):
            folder = next(fresh)
            write_domain(folder / "texts", "law", split_texts(0) | {split: [""]})
            with pytest.raises(
                DemixError, match=rf"split '{split}' has 0 tokens.*train: 12 documents"
            ):
                here(make_config(folder))


def test_domain_with_less_than_one_sequence_is_an_error(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0) | {"train": ["x" * 7]})
    with pytest.raises(DemixError, match="'train' has 9 tokens, needs at least 10"):
        here(make_config(tmp_path, context=9))


def test_domain_with_exactly_one_sequence_can_be_trained_on(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0) | {"train": ["x" * 8]})
    here(make_config(tmp_path, context=9))
    windows = PackedSequences(PreparedData(tmp_path / "data").tokens("law", "train"), 0, 9, None)
    assert len(windows) == 1
    assert windows[0].tokens.tolist() == spell(["x" * 8])


def test_novel_domain_is_listed_as_novel(tmp_path: Path) -> None:
    for seed, name in enumerate(("law", "med", "news")):
        write_domain(tmp_path / "texts", name, split_texts(seed))
    here(make_config(tmp_path, novel_domains=("news",)))
    data = PreparedData(tmp_path / "data")
    assert (data.train, data.novel) == (("law", "med"), ("news",))
    assert data.tokens("news", "test")[:].tolist() == spell(split_texts(2)["test"])


def test_novel_domain_needs_no_training_text(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "law", split_texts(0))
    write_domain(tmp_path / "texts", "news", split_texts(1) | {"train": []})
    here(make_config(tmp_path, novel_domains=("news",)))
    data = PreparedData(tmp_path / "data")
    assert data.tokens("news", "train")[:].tolist() == []
    assert data.index("news", "train").shape == (0, 2)


def test_domain_cannot_be_both_trained_on_and_novel(two: Config) -> None:
    both = {"train_domains": ("law", "med"), "novel_domains": ("med",)}
    with pytest.raises(DemixError, match=r"in data.train_domains and in data.novel_domains: med;"):
        changed(two, **both)


def test_domain_called_tokenizer_does_not_replace_the_tokenizer(tmp_path: Path) -> None:
    write_domain(tmp_path / "texts", "tokenizer", split_texts(0))
    with pytest.raises(DemixError, match="tokenizer"):
        here(make_config(tmp_path))
