"""Tokenizers: nothing is lost, nothing is confused, and what was saved is what is loaded."""

import functools
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from cases import case, folders

from demix_jax.data.prepare.train_tokenizer import train_sentencepiece
from demix_jax.data.tokenizers import (
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    measure_round_trip,
    open_tokenizer,
    save_tokenizer,
)
from demix_jax.errors import DemixError
from demix_jax.typed_files import unseal

KINDS = ["bytes", "sentencepiece", "huggingface"]
END = "<|endoftext|>"
HARD = {
    "newlines": "a\n\n\nb\n",
    "dos": "one\r\ntwo\r\n",
    "tabs": "\tif x:\n\t\treturn\n",
    "runs of spaces": "a  b   c    d     ",
    "leading space": " a",
    "only space": " ",
    "only spaces": "       ",
    "emoji": "ok 👍🏽 👩‍👩‍👧 🇫🇷",
    "unseen": "ÆØÅ Привет 漢字 ऋ ﷽ ∮",
    "composed and decomposed": "é e\u0301 ﬁ ① Ａ",
    "controls": "\0 \x01 \x0b \x0c \x1c \x7f \x85",
    "odd spaces": "\u00a0\u2003\u200b\u2028\u2029\u3000\ufeff",
    "replacement": "\ufffd \u2047",
    "beyond the BMP": "\U0001d54f \U0010ffff",
    "pieces by name": "</s><s><unk><0x41><0x0A><pad>",
    "empty": "",
}


def generated(seed: int, count: int) -> list[str]:
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 7))) for _ in range(300)]
    return [" ".join(rng.choices(words, k=40)) + "\n  indented\n" for _ in range(count)]


def any_characters(seed: int, length: int) -> str:
    rng = random.Random(seed)
    codes = (rng.choice([rng.randrange(128), rng.randrange(0x110000)]) for _ in range(length))
    return "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000 and c != 0x2581)


def train_bpe(path: Path, vocab_size: int, special: list[str]) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(generated(0, 100), trainer)
    model.save(str(path))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizers")
    train_sentencepiece(generated(0, 100), 400, folder / "one.model")
    train_sentencepiece(generated(1, 100), 400, folder / "other.model")
    train_bpe(folder / "one.json", 400, [END])
    train_bpe(folder / "other.json", 500, [END])
    return folder


@pytest.fixture(scope="module")
def sources(folder: Path) -> dict[str, str | Path]:
    return {
        "bytes": "bytes",
        "sentencepiece": folder / "one.model",
        "huggingface": folder / "one.json",
    }


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def source(kind: str, sources: dict[str, str | Path]) -> str | Path:
    return sources[kind]


@pytest.fixture
def tokenizer(source: str | Path) -> Tokenizer:
    return open_tokenizer(source)


def test_text_is_spelled_without_loss(tokenizer: Tokenizer) -> None:
    for text in HARD.values():
        with case(text):
            assert tokenizer.decode(tokenizer.encode_batch([text])[0].tolist()) == text


def test_any_characters_are_spelled_without_loss(tokenizer: Tokenizer) -> None:
    for seed in range(3):
        with case(seed):
            text = any_characters(seed, 5000)
            assert tokenizer.decode(tokenizer.encode_batch([text])[0].tolist()) == text


@pytest.mark.xfail(strict=True, reason="SentencePiece writes spaces as this character")
def test_sentencepiece_keeps_the_character_it_writes_for_a_space(folder: Path) -> None:
    tokenizer = open_tokenizer(folder / "one.model")
    assert tokenizer.decode(tokenizer.encode_batch(["a\u2581b"])[0].tolist()) == "a\u2581b"


def test_eod_is_below_the_vocabulary_size(tokenizer: Tokenizer) -> None:
    assert 0 <= tokenizer.eod < tokenizer.vocab_size


def test_ids_fit_the_vocabulary_and_are_never_eod(tokenizer: Tokenizer) -> None:
    for ids in tokenizer.encode_batch([*HARD.values(), *generated(2, 20), any_characters(9, 5000)]):
        assert ids.dtype == np.int32
        assert ((ids >= 0) & (ids < tokenizer.vocab_size) & (ids != tokenizer.eod)).all()


def make_json(
    path: Path, model: Any, special: Sequence[str] = (), tokens: Sequence[str] = (), **parts: Any
) -> Path:
    """A tokenizer.json of a model, added tokens and other parts; saved at the path."""
    made = tokenizers.Tokenizer(model)
    made.add_special_tokens(list(special))
    made.add_tokens(list(tokens))
    for name, part in parts.items():
        setattr(made, name, part)
    made.save(str(path))
    return path


def letters(*pieces: str) -> dict[str, int]:
    """Ids of "<unk>", ASCII characters and pieces."""
    return {piece: i for i, piece in enumerate(["<unk>", *map(chr, range(32, 127)), *pieces])}


def end_makers() -> dict[str, tuple[dict[str, Any], str | None]]:
    """Arguments of `make_json`, and the end token that no text can be encoded to, if any."""
    models, ends = tokenizers.models, ("</s>", "[SEP]", END)
    words = tokenizers.pre_tokenizers.WhitespaceSplit()
    bpe = functools.partial(models.BPE, merges=[], unk_token="<unk>")
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]
    merged = bpe(letters("</", "</s", "</s>", END), merges=merges)
    every = letters(*ends)
    scored = models.Unigram([(piece, -float(i)) for piece, i in every.items()], 0)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    spaces = tokenizers.pre_tokenizers.Metaspace()
    return {
        "added": ({"model": bpe(letters()), "tokens": ends}, None),
        "one special": (
            {"model": bpe(letters()), "tokens": ["</s>"], "special": ["[SEP]"]},
            "[SEP]",
        ),
        "listed": ({"model": bpe(letters(END))}, END),
        "merged": ({"model": merged, "special": ["</s>"]}, END),
        "whole words": (
            {"model": bpe(every, ignore_merges=True), "special": ends, "pre_tokenizer": words},
            None,
        ),
        "unknown": ({"model": bpe(letters(END), unk_token=END), "special": [END]}, None),
        "first id": ({"model": bpe({END: 0, "<unk>": 1})}, END),
        "unigram": ({"model": scored, "special": ends, "pre_tokenizer": spaces}, None),
        "unigram's unknown": ({"model": models.Unigram([("</s>", 0.0)], 0)}, None),
        "word level": (
            {
                "model": models.WordLevel(every, "<unk>"),
                "special": ends,
                "pre_tokenizer": words,
            },
            None,
        ),
        "word piece": (
            {
                "model": models.WordPiece(every, unk_token="<unk>"),
                "special": ends,
                "pre_tokenizer": words,
            },
            None,
        ),
        "byte level": (
            {
                "model": bpe(letters()),
                "special": ["<eos>"],
                "tokens": [END],
                "pre_tokenizer": byte_level,
            },
            "<eos>",
        ),
    }


def test_text_that_spells_an_end_is_text(folder: Path, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(generated(0, 100)),
        model_prefix=str(tmp_path / "user"),
        vocab_size=100,
        user_defined_symbols=["</s>", "<s>"],
        minloglevel=2,
    )
    files: dict[Path, str | None] = {
        folder / "one.json": END,
        folder / "one.model": "</s>",
        tmp_path / "user.model": None,
    }
    for name, (arguments, end) in end_makers().items():
        files[make_json(tmp_path / f"{name}.json", **arguments)] = end
    names = ("</s>", "[SEP]", END, "<eos>", "<|end_of_text|>")
    forms = ("{0}", "a {0} b", "a{0}b{0}", "\n{0}\t", "漢{0}")
    texts = [form.format(name) for name in names for form in forms]
    for path, end in files.items():
        with case(path.name):
            tokenizer = open_tokenizer(path)
            for ids in tokenizer.encode_batch(texts):
                assert tokenizer.eod not in ids
                assert ids.max(initial=0) < tokenizer.vocab_size
            if path.suffix == ".json":
                library = tokenizers.Tokenizer.from_file(str(path))
                size = max(library.get_vocab().values()) + 1
                assert tokenizer.eod == (library.token_to_id(end) if end else size)
            else:
                pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
                wanted = pieces.piece_to_id(end) if end else pieces.get_piece_size()
                assert tokenizer.eod == wanted
    spelled = open_tokenizer(folder / "one.json")
    assert spelled.decode(spelled.encode_batch([f"a {END} b"])[0].tolist()) == f"a {END} b"


def test_what_the_library_cannot_encode_is_one_line(tmp_path: Path) -> None:
    models, words = tokenizers.models, tokenizers.pre_tokenizers.Whitespace()
    makers = {
        "word level": models.WordLevel({"court": 0}, "[UNK]"),
        "word piece": models.WordPiece({"court": 0}, unk_token="[UNK]"),
        "unigram": models.Unigram([("court", -1.0), *((letter, -9.0) for letter in "court ")]),
    }
    for name, model in makers.items():
        with case(name):
            path = tmp_path / f"{name}.json"
            make_json(path, model, **({} if name == "unigram" else {"pre_tokenizer": words}))
            tokenizer = open_tokenizer(path)
            assert [len(ids) for ids in tokenizer.encode_batch(["court"])] == [1]
            message = (
                rf"^the tokenizer {path} cannot encode the text that begins 'court zebra': .*unk"
                ".*; use one that has a token for unknown .*, or data.tokenizer=bytes$"
            )
            with pytest.raises(DemixError, match=re.compile(message, re.I)):
                tokenizer.encode_batch(["court", "court zebra", "court"])
    for source in ("bytes", tmp_path / "unigram.json"):
        with case(source), pytest.raises(DemixError, match="cannot encode the text that begins"):
            open_tokenizer(source).encode_batch(["court", "\ud800"])


def test_tokenizer_that_draws_lots_is_refused(folder: Path, tmp_path: Path) -> None:
    values = json.loads((folder / "one.json").read_text())
    path = tmp_path / "x.json"
    for key, value in [("dropout", 0.1), ("dropout", 1.0), ("alpha", 0.5), ("nbest_size", -1)]:
        with case(key, value):
            path.write_text(json.dumps(values | {"model": values["model"] | {key: value}}))
            with pytest.raises(DemixError, match=rf"x.json tokenizes at random \(model.{key} is"):
                open_tokenizer(path)
    for value in (None, 0.0):
        path.write_text(json.dumps(values | {"model": values["model"] | {"dropout": value}}))
        open_tokenizer(path)
    path.write_bytes(b"\xef\xbb\xbf" + (folder / "one.json").read_bytes())  # a byte order mark
    assert open_tokenizer(path).vocab_size == open_tokenizer(folder / "one.json").vocab_size


def test_round_trip_counts_what_comes_back(folder: Path, tmp_path: Path) -> None:
    texts = ["The Court ", "the court", "漢漢 c"]
    lower = tokenizers.normalizers.Lowercase()
    drops = make_json(tmp_path / "drops.json", tokenizers.models.BPE(letters(), []))
    model, joined = tokenizers.models.BPE(letters(), []), tokenizers.decoders.Fuse()
    folds = make_json(tmp_path / "folds.json", model, normalizer=lower, decoder=joined)
    for source, expected in {
        "bytes": (3, 3, 23, 23),
        folder / "one.model": (3, 3, 23, 23),
        folder / "one.json": (3, 3, 23, 23),
        drops: (3, 0, 23, 21),
        folds: (3, 1, 23, 19),
    }.items():
        with case(source):
            found = measure_round_trip(open_tokenizer(source), texts)
            assert found == expected
            share = 1 if found.unchanged == 3 else min(found.returned / 23, 0.9999)
            assert found.share == share
    assert measure_round_trip(open_tokenizer("bytes"), []).share == 1


def test_eod_is_dropped_in_decoding(tokenizer: Tokenizer) -> None:
    ids = [i.tolist() for i in tokenizer.encode_batch(["one\n", "two"])]
    stream = [tokenizer.eod, *ids[0], tokenizer.eod, *ids[1], tokenizer.eod]
    assert tokenizer.decode(stream) == "one\ntwo"


def test_a_text_is_encoded_alike_in_any_batch(tokenizer: Tokenizer) -> None:
    texts = [*HARD.values(), *generated(3, 30)]
    together = tokenizer.encode_batch(texts)
    alone = [tokenizer.encode_batch([text])[0] for text in texts]
    assert [a.tolist() for a in together] == [b.tolist() for b in alone]


def test_no_texts_give_no_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch([]) == []


def test_bytes_are_utf8() -> None:
    ids = ByteTokenizer().encode_batch(["aé\n😀"])[0]
    assert ids.tolist() == [0x61, 0xC3, 0xA9, 0x0A, 0xF0, 0x9F, 0x98, 0x80]


def test_bytes_have_257_ids() -> None:
    tokenizer = open_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)


def test_sentencepiece_ids_are_the_librarys(folder: Path) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "one.model"))
    texts = [*HARD.values(), *generated(4, 20)]
    ours = open_tokenizer(folder / "one.model").encode_batch(texts)
    assert [ids.tolist() for ids in ours] == [library.encode(text) for text in texts]


def test_sentencepiece_has_the_size_asked_for(folder: Path) -> None:
    assert open_tokenizer(folder / "one.model").vocab_size == 400


def test_sentencepiece_ends_documents_with_its_end_of_sentence(folder: Path) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "one.model"))
    assert library.id_to_piece(open_tokenizer(folder / "one.model").eod) == "</s>"


def test_sentencepiece_without_end_of_sentence_gets_one_id_more(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(generated(0, 100)),
        model_prefix=str(tmp_path / "no_end"),
        vocab_size=100,
        eos_id=-1,
        minloglevel=2,
    )
    tokenizer = open_tokenizer(tmp_path / "no_end.model")
    assert (tokenizer.vocab_size, tokenizer.eod) == (101, 100)
    assert tokenizer.decode([*tokenizer.encode_batch(["ab"])[0].tolist(), 100]) == "ab"


def test_sentencepiece_learns_words_of_the_text(folder: Path) -> None:
    text = generated(0, 100)[0]
    ids = open_tokenizer(folder / "one.model").encode_batch([text])[0]
    assert len(ids) < 0.7 * len(text)


def test_sentencepiece_never_joins_lines(folder: Path) -> None:
    library = sentencepiece.SentencePieceProcessor(model_file=str(folder / "one.model"))
    pieces = [library.id_to_piece(i) for i in range(library.get_piece_size())]
    assert [piece for piece in pieces if "\n" in piece] == ["\n"]


def test_text_that_does_not_fit_a_vocabulary_is_an_error(tmp_path: Path) -> None:
    """With advice that helps, none of it SentencePiece's own."""
    many = ["".join(chr(0x4E00 + (i * 7 + j) % 700) for j in range(200)) for i in range(200)]
    for name, texts, size, advice in [
        ("few", ["a b c\n"], 5000, "its text has only 263 pieces; add text"),
        (
            "some",
            [*generated(0, 3)],
            60_000,
            r"has only (\d+) pieces; set data.vocab_size to \1, add text",
        ),
        ("many", many, 400, r"alone are (\d+) pieces; set data.vocab_size to that or more"),
        ("none", [], 400, "there is no text to train it on; add text"),
        ("blank", ["\n", ""], 400, "there is no text to train it on; add text"),
        ("mark", ["\u2585"], 400, "there is no text to train it on; add text"),
    ]:
        with case(name):
            path = tmp_path / "x.model"
            message = (
                rf"^a sentencepiece model of data.vocab_size={size} cannot be trained: .*{advice}, "
                "or use data.tokenizer=bytes$"
            )
            with pytest.raises(DemixError, match=message) as caught:
                train_sentencepiece(texts, size, path)
            assert not path.exists()
            assert not re.search(r"--|character_coverage|Please", str(caught.value))
            if name in ("some", "many"):
                found = re.search(r"(\d+) pieces", str(caught.value))
                assert found
                train_sentencepiece(texts, int(found[1]), path)
                path.unlink()


def test_lines_of_any_length_train_sentencepiece(tmp_path: Path) -> None:
    """Lines that it would drop are cut: too long ones, and those with a character of its own."""
    words = generated(0, 100)
    for name, line in {
        "long": "zqxzqx " * 20_000,
        "long, wide": "zqxzqx漢 " * 20_000,
        "one long word": "zqx" * 20_000,
        "its own mark": "zqxzqx zqxzqx \u2585 zqxzqx\n" * 400,
        "a line that repeats itself": "".join(words).replace("\n", " ")[:1000] * 50
        + "zqxzqx " * 9999,
    }.items():
        with case(name):
            train_sentencepiece([*words, line], 400, tmp_path / "x.model")
            tokenizer = open_tokenizer(tmp_path / "x.model")
            assert len(tokenizer.encode_batch(["zqxzqx"])[0]) <= 2
            assert tokenizer.decode(tokenizer.encode_batch([line])[0].tolist()) == line


def test_fault_of_the_text_is_not_blamed_on_the_vocabulary(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield from generated(0, 100)
        raise DemixError("a.jsonl:3: broken JSON")

    with pytest.raises(DemixError, match="^a.jsonl:3: broken JSON$"):
        train_sentencepiece(texts(), 400, tmp_path / "x.model")


def test_huggingface_ids_are_the_librarys(folder: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(folder / "one.json"))
    texts = [*HARD.values(), *generated(4, 20)]
    ours = open_tokenizer(folder / "one.json").encode_batch(texts)
    assert [ids.tolist() for ids in ours] == [library.encode(text).ids for text in texts]


def test_huggingface_ends_documents_with_its_end_of_text(folder: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(folder / "one.json"))
    tokenizer = open_tokenizer(folder / "one.json")
    assert tokenizer.eod == library.token_to_id(END)
    assert tokenizer.vocab_size == library.get_vocab_size()


def test_huggingface_without_end_of_text_gets_one_id_more(tmp_path: Path) -> None:
    train_bpe(tmp_path / "plain.json", 300, [])
    tokenizer = open_tokenizer(tmp_path / "plain.json")
    assert (tokenizer.vocab_size, tokenizer.eod) == (301, 300)


def test_huggingface_ids_with_gaps_fit_the_vocabulary(tmp_path: Path) -> None:
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 2}, unk_token="a"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "gap.json"))
    tokenizer = open_tokenizer(tmp_path / "gap.json")
    ids = tokenizer.encode_batch(["a b"])[0].tolist()
    assert tokenizer.eod not in ids
    assert max(ids) < tokenizer.vocab_size


def test_huggingface_settings_do_not_cut_or_fill_or_wrap_text(folder: Path, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(folder / "one.json"))
    texts = ["abc", generated(5, 1)[0]]
    plain = [library.encode(text).ids for text in texts]
    library.enable_truncation(4)
    library.enable_padding(length=100)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{END} $A {END}", special_tokens=[(END, library.token_to_id(END))]
    )
    library.save(str(tmp_path / "set.json"))
    ours = open_tokenizer(tmp_path / "set.json").encode_batch(texts)
    assert [ids.tolist() for ids in ours] == plain


def test_equal_definitions_have_equal_hashes(
    source: str | Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    if isinstance(source, Path):
        copy = tmp_path / f"renamed{source.suffix}"
        copy.write_bytes(source.read_bytes())
        source = copy
    assert open_tokenizer(source).hash == tokenizer.hash


def test_different_definitions_have_different_hashes(folder: Path) -> None:
    files = ["one.model", "other.model", "one.json", "other.json"]
    made = [open_tokenizer("bytes"), *(open_tokenizer(folder / name) for name in files)]
    assert len({tokenizer.hash for tokenizer in made}) == len(made)


def test_saved_tokenizer_is_loaded(
    source: str | Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    save_tokenizer(source, tmp_path / "tokenizer", {})
    loaded = load_tokenizer(tmp_path / "tokenizer")
    texts = [*HARD.values(), *generated(6, 5)]
    assert (loaded.hash, loaded.eod) == (tokenizer.hash, tokenizer.eod)
    assert [a.tolist() for a in loaded.encode_batch(texts)] == [
        b.tolist() for b in tokenizer.encode_batch(texts)
    ]


def test_saving_after_an_interruption_starts_over(source: str | Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.partial").mkdir()
    (tmp_path / "tokenizer.partial" / "junk").write_text("half")
    save_tokenizer(source, tmp_path / "tokenizer", {})
    load_tokenizer(tmp_path / "tokenizer")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer"]
    assert not (tmp_path / "tokenizer" / "junk").exists()


def test_altered_file_is_refused(folder: Path, tmp_path: Path) -> None:
    for suffix in ["model", "json"]:
        with case(suffix):
            saved = tmp_path / suffix
            save_tokenizer(folder / f"one.{suffix}", saved, {})
            (saved / f"tokenizer.{suffix}").write_bytes((folder / f"other.{suffix}").read_bytes())
            with pytest.raises(DemixError, match="was altered: hash .*, expected "):
                load_tokenizer(saved)


def test_altered_note_is_refused(tmp_path: Path) -> None:
    save_tokenizer("bytes", tmp_path / "tokenizer", {})
    note = tmp_path / "tokenizer" / "tokenizer_meta.json"
    note.write_text(json.dumps(unseal(json.loads(note.read_text())) | {"hash": "0" * 16}))
    with pytest.raises(DemixError, match="was altered"):
        load_tokenizer(tmp_path / "tokenizer")


def test_removed_file_is_an_error(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(folder / "one.model", tmp_path / "tokenizer", {})
    (tmp_path / "tokenizer" / "tokenizer.model").unlink()
    with pytest.raises(DemixError, match="tokenizer.model does not exist"):
        load_tokenizer(tmp_path / "tokenizer")


def test_folder_without_tokenizer_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DemixError, match="run `demix prepare` first"):
        load_tokenizer(tmp_path / "nothing")


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for name in ["none.model", "none.json"]:
        with case(name):
            folder = next(fresh)
            with pytest.raises(DemixError, match=f"{name} does not exist"):
                open_tokenizer(folder / name)


def test_unknown_kind_names_the_known_ones() -> None:
    for name in ["wordpiece", "Bytes", "vocab.txt", "model", ""]:
        with (
            case(name),
            pytest.raises(DemixError, match="sentencepiece, bytes, .*FILE.model .*tokenizer.json"),
        ):
            open_tokenizer(name)


def test_file_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for content in [b"not a model", b"\0" * 100, b"{}"]:
        for name, message in [
            ("x.model", "is not a SentencePiece model"),
            ("x.json", "is not a Hugging Face tokenizer"),
        ]:
            with case(content, name, message):
                folder = next(fresh)
                (folder / name).write_bytes(content)
                with pytest.raises(DemixError, match=message):
                    open_tokenizer(folder / name)


def test_cut_model_is_an_error(folder: Path, tmp_path: Path) -> None:
    whole = (folder / "one.model").read_bytes()
    (tmp_path / "cut.model").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DemixError, match="is not a SentencePiece model"):
        open_tokenizer(tmp_path / "cut.model")


def test_empty_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.model").touch()
    with pytest.raises(DemixError, match="is not a SentencePiece model"):
        open_tokenizer(tmp_path / "empty.model")
