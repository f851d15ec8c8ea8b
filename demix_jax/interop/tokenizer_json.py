"""Tokenizers of a run as a `tokenizer.json`: the same ids for every text, or an error.

Special tokens are the exception: where a text spells one, ours reads text, and transformers the
token. Whatever is written is compared with the original on texts that are hard to read.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from demix_jax.data.tokenizers import SentencePieceTokenizer, Tokenizer
from demix_jax.errors import DemixError

_SPACE = "\u2581"  # by which SentencePiece means a space
_NEW_TOKEN = "<|document|>"  # name of a document token that has an id, and no name
_ROUNDING = 1e-4  # of the score of a token, in nats
_NEVER = -1e6  # score of a piece that text is never cut into
HARD_TEXTS = (
    "a</s>b <unk> </s>",
    "a plain sentence, with 12 numbers.",
    "a\n\n\nb\n",
    "one\r\ntwo\r\n",
    "\tif x:\n\t\treturn\n",
    "a  b   c    d     ",
    " a",
    " ",
    "       ",
    "\n",
    "ok \U0001f44d\U0001f3fd \U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "\u00c6\u00d8\u00c5 \u041f\u0440\u0438\u0432\u0435\u0442 \u6f22\u5b57 \u090b \u222e",
    "\u00e9 e\u0301 \ufb01 \u2460 \uff21",
    "\x01 \x0b \x0c \x1c \x7f \x85",
    "\u00a0\u2003\u200b\u2028\u2029\u3000\ufeff",
    "def f(x):\n    return {'a': [1, 2.5e-3]}  # comment\n",
    "\U0001d54f \U0010ffff",
)


def make_tokenizer(
    tokenizer: Tokenizer, definition: Path | None, texts: Iterable[str] = ()
) -> tuple[Any, float]:
    """Returns a `tokenizers.Tokenizer` that gives the ids of a run's tokenizer.

    Args:
      tokenizer: tokenizer of the run.
      definition: its file, if it has one.
      texts: texts to compare both on, besides `HARD_TEXTS`.

    Returns:
      The tokenizer, and the share of tokens in these texts that it cuts in another, equally likely
      way; 0 for all but SentencePiece's unigram models.

    Raises:
      DemixError: a SentencePiece model of a kind that has no counterpart, or other ids for a text.
    """
    import tokenizers

    if tokenizer.kind == "huggingface":
        assert definition is not None
        made = tokenizers.Tokenizer.from_file(str(definition))
        made.no_truncation()
        made.no_padding()
        _name_document_token(made, tokenizer.eod)
    elif tokenizer.kind == "sentencepiece":
        assert definition is not None
        made = _from_sentencepiece(definition)
        _name_document_token(made, tokenizer.eod)
        _begin_with(made, tokenizer.eod)
    else:
        made = _bytes_tokenizer()
        _name_document_token(made, tokenizer.eod)
        _begin_with(made, tokenizer.eod)
    return made, _count_ties(tokenizer, made, (*HARD_TEXTS, *texts))


def _count_ties(tokenizer: Tokenizer, made: Any, texts: Sequence[str]) -> float:
    """Returns the share of tokens that differ where two ways to cut a text have the same score.

    SentencePiece adds scores in float32 and tokenizers in float64: which of two equally likely ways
    is taken depends on the rounding of all that came before.

    Raises:
      DemixError: any other difference.
    """
    import tokenizers

    copy = tokenizers.Tokenizer.from_str(made.to_str())
    copy.encode_special_tokens = True
    total = different = 0
    for text in texts:
        try:
            (found,) = tokenizer.encode_batch([text])
        except DemixError:
            continue  # neither may have a token for it
        ours, theirs = found.tolist(), copy.encode(text, add_special_tokens=False).ids
        total += len(ours)
        if ours == theirs:
            continue
        if not _is_tie(tokenizer, ours, theirs):
            at = [a == b for a, b in zip([*ours, -1], [*theirs, -1], strict=False)].index(False)
            raise DemixError(
                f"the {tokenizer.kind} tokenizer cannot be written as tokenizer.json: for the text "
                f"{text[:40]!r} token {at} would be another; `demix experts export` keeps it as it "
                "is"
            )
        different += (Counter(ours) - Counter(theirs)).total() or 1
    return different / max(1, total)


def _is_tie(tokenizer: Tokenizer, ours: list[int], theirs: list[int]) -> bool:
    """Returns True if two ways to cut one text have the same score, but for rounding."""
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return False
    gap = tokenizer.score(ours) - tokenizer.score(theirs)
    return abs(gap) < _ROUNDING * len(ours) and tokenizer.decode(ours) == tokenizer.decode(theirs)


def _name_document_token(made: Any, eod: int) -> None:
    """Makes the id that separates documents a special token with a name."""
    import tokenizers

    name = made.id_to_token(eod) or _NEW_TOKEN
    made.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True)])
    if made.token_to_id(name) != eod:
        raise DemixError(
            f"the tokenizer has a token {name!r} of id {made.token_to_id(name)}, and documents "
            f"end with id {eod}, which has no name; it cannot be written as tokenizer.json"
        )


def _begin_with(made: Any, eod: int) -> None:
    """Lets texts begin with the document token, as all texts of training did."""
    from tokenizers import processors

    name = made.id_to_token(eod)
    made.post_processor = processors.TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name} $B", special_tokens=[(name, eod)]
    )


def _bytes_tokenizer() -> Any:
    """Returns a tokenizer of bytes, each of which is its own id."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    vocabulary = {character: byte for byte, character in _byte_characters().items()}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return made


def _byte_characters() -> dict[int, str]:
    """Returns the character that GPT-2's byte-level vocabularies have for each byte."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def _from_sentencepiece(path: Path) -> Any:
    """Returns a tokenizer that reads text as a SentencePiece model does."""
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import decoders, normalizers, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(path.read_bytes())
    spec = proto.normalizer_spec
    if proto.trainer_spec.treat_whitespace_as_suffix or not spec.escape_whitespaces:
        raise DemixError(
            f"{path} writes spaces in a way that tokenizer.json has not; it cannot be exported"
        )
    made = tokenizers.Tokenizer(_model(proto, path))
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(tokenizers.Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    if lone := _unknown_characters(proto):
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(character, "isolated") for character in lone]
        )
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    made.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    kinds = proto.SentencePiece
    own = [
        tokenizers.AddedToken(
            piece.piece.replace(_SPACE, " "),
            normalized=False,
            special=piece.type != kinds.USER_DEFINED,
        )
        for piece in proto.pieces
        if piece.type in (kinds.USER_DEFINED, kinds.CONTROL)
    ]
    made.add_special_tokens([token for token in own if token.special])
    made.add_tokens([token for token in own if not token.special])
    return made


def _unknown_characters(proto: Any) -> list[str]:
    """Returns characters of pieces that text never is, such as </s>, which no other piece has.

    An unknown character costs more than any piece, so text that spells such a piece would be cut
    into it. A text is cut at these characters anyhow: doing so first changes nothing else.
    """
    kinds = proto.SentencePiece
    spelled = {
        character
        for piece in proto.pieces
        if piece.type in (kinds.NORMAL, kinds.USER_DEFINED)
        for character in piece.piece
    }
    silent = [p.piece for p in proto.pieces if p.type in (kinds.CONTROL, kinds.UNKNOWN)]
    return sorted({c for piece in silent for c in piece if len(piece) > 1} - spelled)


def _model(proto: Any, path: Path) -> Any:
    """Returns the model of pieces: unigram, or BPE with the merges that its pieces imply."""
    from tokenizers import models

    trainer = proto.trainer_spec
    kinds = proto.SentencePiece
    spelled = (kinds.NORMAL, kinds.USER_DEFINED)
    pieces = [(p.piece, p.score if p.type in spelled else _NEVER) for p in proto.pieces]
    if trainer.model_type == trainer.UNIGRAM:
        return models.Unigram(pieces, trainer.unk_id, trainer.byte_fallback)
    if trainer.model_type != trainer.BPE:
        raise DemixError(
            f"{path} is a SentencePiece model of words or characters, which tokenizer.json has "
            "not; it cannot be exported"
        )
    ids = {piece: i for i, (piece, _) in enumerate(pieces)}
    merges = [
        (-score, ids[piece[:i]], ids[piece[i:]], piece[:i], piece[i:])
        for piece, score in pieces
        for i in range(1, len(piece))
        if score != _NEVER and piece[:i] in ids and piece[i:] in ids
    ]
    return models.BPE(
        vocab=ids,
        merges=[(left, right) for *_, left, right in sorted(merges)],
        unk_token=pieces[trainer.unk_id][0],
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def tokenizer_config(made: Any, eod: int, context: int) -> dict[str, Any]:
    """Returns the tokenizer_config.json of a tokenizer that came with none."""
    name = made.id_to_token(eod)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name,
        "eos_token": name,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }


def to_text(made: Any) -> str:
    """Returns a tokenizer as the text of its tokenizer.json."""
    return json.dumps(json.loads(made.to_str()), ensure_ascii=False, indent=1) + "\n"
