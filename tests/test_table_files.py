"""Tables: every row of Parquet and Arrow files is the document that the same JSON line is."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from cases import case

from demix_jax.config.schema import Config, DataConfig
from demix_jax.data.dataset import PreparedData
from demix_jax.data.prepare.prepare import prepare
from demix_jax.data.sources.base import BadRecords, Document, Selection, hash_split
from demix_jax.data.sources.text_files import TextFiles
from demix_jax.errors import DemixError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
ROWS: list[dict[str, Any]] = [
    {
        "text": f"row {i} with 👍🏽 and\nlines  ",
        "meta": {"body": f"inner {i}", "lang": "en" if i % 3 else "de"},
        "id": f"n{i}" if i % 2 else None,
        "split": ("train", "valid", "dev", "test", None)[i % 5],
        "number": i,
    }
    for i in range(250)
]


def write_tables(folder: Path) -> dict[str, Path]:
    """The same rows as Parquet in groups of 40, as Arrow file and stream, and as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(ROWS)
    paths = {kind: folder / f"rows.{kind}" for kind in ("parquet", "arrow", "feather", "jsonl")}
    pq.write_table(table, paths["parquet"], row_group_size=40)
    with pa.ipc.new_stream(paths["arrow"], table.schema) as writer:  # as `datasets` writes them
        writer.write_table(table, max_chunksize=30)
    with pa.ipc.new_file(paths["feather"], table.schema) as writer:
        writer.write_table(table, max_chunksize=30)
    paths["jsonl"].write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return paths


def read(path: Path, selection: Selection = Selection(), part_bytes: int = 1 << 26):  # noqa: B008
    parts = TextFiles(str(path), selection, part_bytes).parts()
    parts = pickle.loads(pickle.dumps(parts))
    return [d for part in parts for d in part.documents(BadRecords())], len(parts)


def test_tables_hold_what_json_lines_hold(tmp_path: Path) -> None:
    paths = write_tables(tmp_path)
    selections = [
        Selection(),
        Selection("meta/body"),
        Selection(where=(("meta/lang", ("de",)), ("number", ("3", "6", "9", "10")))),
    ]
    for selection in selections:
        expected = [(d.text, d.split) for d in read(paths["jsonl"], selection)[0]]
        for kind in ("parquet", "arrow", "feather"):
            with case(selection, kind):
                found, _ = read(paths[kind], selection)
                assert [(d.text, d.split) for d in found] == expected
    named = read(paths["parquet"])[0]
    assert named[:2] == [
        Document(ROWS[0]["text"], "rows.parquet@0", "train"),
        Document(ROWS[1]["text"], "n1", "valid"),
    ]


def test_ranges_of_row_groups_make_the_same_documents(tmp_path: Path) -> None:
    path = write_tables(tmp_path)["parquet"]
    whole, one = read(path)
    assert one == 1
    for size in (1, 3000, 9000):
        found, parts = read(path, part_bytes=size)
        assert found == whole
        assert parts > 1


def test_what_is_wrong_with_a_table_is_said(tmp_path: Path) -> None:
    paths = write_tables(tmp_path)
    with pytest.raises(DemixError, match=r"no column 'body'; name the text by \?field= .*number"):
        read(paths["parquet"], Selection("body"))
    with pytest.raises(DemixError, match="row 0: expected an object with a string field 'number'"):
        read(paths["feather"], Selection("number"))
    for kind in ("parquet", "arrow", "feather"):
        with case(kind):
            data = paths[kind].read_bytes()
            paths[kind].write_bytes(data[: len(data) // 2])
            with pytest.raises(DemixError, match=f"rows.{kind} cannot be read"):
                read(paths[kind])


def test_a_domain_of_parquet_is_prepared(tmp_path: Path) -> None:
    write_tables(tmp_path / "law")
    config = Config(
        data=DataConfig(
            dir=str(tmp_path / "data"),
            sources=(f"law={tmp_path}/law/*.parquet?field=meta/body",),
            tokenizer="bytes",
        )
    )
    config.model.context = 16
    prepare(config, workers=1)
    data = PreparedData(tmp_path / "data")
    text = data.tokenizer.decode(data.tokens("law", "test")[:].tolist())
    bodies = [(row["meta"]["body"], row["split"]) for row in ROWS]
    assert text == "".join(b for b, split in bodies if (split or hash_split(b)) == "test")
