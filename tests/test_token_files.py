"""Token files: every byte that is written, against a writer spelled out here, and how they read."""

import binascii
import concurrent.futures
import hashlib
import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from cases import case, folders

from demix_jax.data.token_files import (
    BLOCK,
    INDEX,
    TokenFile,
    TokenFileCounts,
    TokenStream,
    TokenWriter,
    document_key,
    token_dtype,
)
from demix_jax.errors import DemixError

Documents = list[tuple[bytes, list[int]]]
EOD = 7
TYPES = {"uint16": "H", "uint32": "I"}


def random_documents(rng: np.random.Generator, count: int, dtype: str) -> Documents:
    """Texts with token ids that have nothing to do with them; some have neither."""
    highest = np.iinfo(dtype).max
    return [
        (rng.bytes(rng.integers(0, 50)), rng.integers(0, highest, n, endpoint=True).tolist())
        for n in rng.integers(0, 400, count)
    ]


def spelled(documents: Documents, dtype: str) -> tuple[bytes, bytes, TokenFileCounts]:
    """The token file, the index and the counts, as the module describes them."""
    ids, rows = [], b""
    for text, tokens in documents:
        key = hashlib.blake2b(text, digest_size=8).digest()
        rows += struct.pack("<qq", len(ids), len(text)) + key
        ids += [EOD, *tokens]
    ids += [EOD] if documents else []
    data = struct.pack(f"<{len(ids)}{TYPES[dtype]}", *ids)
    blocks = [data[i : i + 16_384] for i in range(0, len(data), 16_384)]
    return (
        data,
        rows,
        TokenFileCounts(
            documents=len(documents),
            tokens=len(ids),
            bytes=sum(len(text) for text, _ in documents),
            sha256=hashlib.sha256(data).hexdigest(),
            crc32=[binascii.crc32(block) for block in blocks],
            index_crc32=binascii.crc32(rows),
        ),
    )


def written(pieces: Sequence[Documents], dtype: str) -> tuple[bytes, bytes, TokenFileCounts]:
    """The same, by the writer; every piece is added at once."""
    tokens, index = io.BytesIO(), io.BytesIO()
    writer = TokenWriter(tokens, index, np.dtype(dtype), EOD)
    for piece in pieces:
        ids = [np.array(document, np.int64) for _, document in piece]
        writer.add([text for text, _ in piece], ids)
    counts = writer.close()
    return tokens.getvalue(), index.getvalue(), counts


def cut(rng: np.random.Generator, documents: Documents) -> list[Documents]:
    """Pieces in a row, some of them empty."""
    places = sorted(rng.integers(0, len(documents), rng.integers(0, 12), endpoint=True))
    ends = [0, *places, len(documents)]
    return [documents[a:b] for a, b in zip(ends, ends[1:], strict=False)]


def test_every_byte_is_as_described() -> None:
    for dtype in TYPES:
        for seed in range(25):
            with case(dtype, seed):
                rng = np.random.default_rng(seed)
                documents = random_documents(rng, int(rng.integers(0, 300)), dtype)
                assert written(cut(rng, documents), dtype) == spelled(documents, dtype)


def test_files_that_end_near_a_block() -> None:
    for dtype in TYPES:
        for excess in [-1, 0, 1]:
            for blocks in [1, 3]:
                with case(dtype, excess, blocks):
                    size = blocks * BLOCK // np.dtype(dtype).itemsize + excess
                    documents = [
                        (b"one", [1] * (size // 2 - 1)),
                        (b"two", [2] * (size - size // 2 - 2)),
                    ]
                    data, index, counts = written([documents[:1], documents[1:]], dtype)
                    assert counts.tokens == size
                    assert len(counts.crc32) == blocks + (excess > 0)
                    assert (data, index, counts) == spelled(documents, dtype)


def test_file_without_documents_is_empty() -> None:
    none = TokenFileCounts(0, 0, 0, hashlib.sha256(b"").hexdigest(), [], 0)
    assert written([], "uint16") == written([[], []], "uint16") == (b"", b"", none)


def test_ids_have_the_width_that_the_vocabulary_needs() -> None:
    for size, dtype in [
        (257, "uint16"),
        (65_536, "uint16"),
        (65_537, "uint32"),
        (250_000, "uint32"),
    ]:
        with case(size, dtype):
            assert token_dtype(size) == np.dtype(dtype)


def test_keys_tell_texts_apart() -> None:
    texts = [bytes(text) for text in np.random.default_rng(0).integers(0, 256, (20_000, 8), "u1")]
    texts += [b"", b" ", b"a", b"a ", "é".encode(), "e\u0301".encode()]
    assert len({document_key(text) for text in texts}) == len(set(texts))
    assert all(0 <= document_key(text) < 2**64 for text in texts)


def write_stream(folder: Path, sizes: Sequence[int], dtype: str) -> tuple[TokenStream, list[int]]:
    """A file for each number of tokens, without those that end documents; and all tokens."""
    rng = np.random.default_rng(0)
    files, expected = [], []
    for i, size in enumerate(sizes):
        ids = rng.integers(0, np.iinfo(dtype).max, size, dtype)
        path = folder / f"{i}.tokens"
        with path.open("wb") as tokens:
            writer = TokenWriter(tokens, io.BytesIO(), np.dtype(dtype), EOD)
            if size:
                writer.add([b"text"], [ids])
            counts = writer.close()
        files.append(TokenFile(path, np.dtype(dtype), counts.tokens, counts.crc32, 1 << 32))
        expected += [EOD, *ids.tolist()] if size else []
    return TokenStream(files), [*expected, EOD]


def maps_of(folder: Path) -> int:
    """How many files of a folder this process has mapped into memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[-1] for line in lines if str(folder) in line})


def test_many_files_read_as_one_and_few_stay_mapped(tmp_path: Path) -> None:
    fresh = folders(tmp_path)
    for dtype in TYPES:
        with case(dtype):
            folder = next(fresh)
            sizes = np.random.default_rng(1).integers(0, 60, 700)
            stream, expected = write_stream(folder, sizes, dtype)
            assert len(stream) == len(expected)
            assert np.asarray(stream).tolist() == expected
            rng = np.random.default_rng(2)
            for start, size in rng.integers(0, (len(expected), 900), (500, 2)):
                assert stream[start : start + size].tolist() == expected[start : start + size]
            if Path("/proc/self/maps").exists():
                assert 200 < maps_of(folder) <= 256


def test_ranges_over_blocks_and_files(tmp_path: Path) -> None:
    sizes = [8190, 8191, 8192, 8193, 20_000]  # blocks hold 8192 tokens
    stream, expected = write_stream(tmp_path, sizes, "uint16")
    ends = np.cumsum([0, *(size + 1 for size in sizes)])
    edges = {int(end + near) for end in ends for near in range(-2, 3)}
    edges |= {int(end + 8192 + near) for end in ends for near in range(-2, 3)}
    places = sorted(edge for edge in edges if 0 <= edge <= len(expected))
    for start in places:
        for stop in places:
            assert stream[start:stop].tolist() == expected[start:stop]


def test_many_threads_read_the_same_files(tmp_path: Path) -> None:
    stream, expected = write_stream(tmp_path, [100] * 400, "uint16")

    def read(seed: int) -> int:
        rng, right = np.random.default_rng(seed), 0
        for start in rng.integers(0, len(expected), 300):
            right += stream[start : start + 150].tolist() == expected[start : start + 150]
        return right

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        assert list(threads.map(read, range(8))) == [300] * 8


def test_altered_files_are_noticed_by_all_threads(tmp_path: Path) -> None:
    stream, expected = write_stream(tmp_path, [100] * 40, "uint16")
    altered = tmp_path / "17.tokens"
    altered.write_bytes(bytes(altered.stat().st_size))
    first = 17 * 101

    def read(start: int) -> bool:
        try:
            assert stream[start : start + 50].tolist() == expected[start : start + 50]
        except DemixError:
            return False
        return True

    starts = np.random.default_rng(0).integers(0, len(expected), 2000).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        found = list(threads.map(read, starts))
    # Its first token is read as the last one of the file before.
    assert found == [not (s < first + 102 and s + 50 > first + 1) for s in starts]
    assert False in found


def test_arrays_outlive_the_maps_they_came_from(tmp_path: Path) -> None:
    stream, expected = write_stream(tmp_path, [100] * 600, "uint16")
    kept = [stream[i * 101 + 1 : i * 101 + 90] for i in range(600)]
    assert [array.tolist() for array in kept] == [
        expected[i * 101 + 1 : i * 101 + 90] for i in range(600)
    ]


def test_index_rows_have_the_documented_size() -> None:
    assert INDEX.itemsize == 24
    assert list(INDEX.names or ()) == ["offset", "bytes", "key"]
