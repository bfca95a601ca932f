"""Parquet files of images, and lists of files."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import SourceError
from services.store import open_store
from services.verify import verify_sample
from tests.conftest import Ingest
from workers.sources.opening import list_source, place_of


def hugging_face(file: Path, images: list[bytes | None], **columns: object) -> Path:
    """As the datasets library writes a split: a struct of bytes and path, class names in the metadata."""
    structs = [None if data is None else {"bytes": data, "path": f"{at}.png"} for at, data in enumerate(images)]
    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": pa.array(structs, pa.struct({"bytes": pa.binary(), "path": pa.string()})), **columns})
    pq.write_table(table.replace_schema_metadata(metadata), file, row_group_size=3)
    return file


def test_rows_are_images_with_their_labels_by_name(tmp_path: Path) -> None:
    file = hugging_face(
        tmp_path / "train-0.parquet", [b"%d" % at for at in range(7)], label=[0, 1] * 3 + [None], n=range(7)
    )
    listing = list_source(file)
    assert listing.name(6) == "train-0.parquet/00000006"
    assert [listing.place(at).read() for at in (6, 0, 3, 2)] == [b"6", b"0", b"3", b"2"]
    assert listing.labels.to_pylist() == ["cat", "dog"] * 3 + [None]
    assert listing.extra.to_pydict() == {"n": list(range(7))}
    assert place_of(listing.place(5).source) == listing.place(5)


def test_several_files_and_plain_columns_of_bytes(tmp_path: Path) -> None:
    for at in range(2):
        pq.write_table(pa.table({"jpg": [b"%d" % at, b"x"], "label": ["a", "b"]}), tmp_path / f"p-{at}.parquet")
    for source in (tmp_path, tmp_path / "p-{0..1}.parquet"):
        listing = list_source(source)
        assert [listing.place(at).read() for at in range(4)] == [b"0", b"x", b"1", b"x"]
        assert listing.labels.to_pylist() == ["a", "b", "a", "b"]


def test_a_table_gives_the_numbers_of_the_folder_it_was_made_of(ingest: Ingest, scenes: Path, tmp_path: Path) -> None:
    ingest()
    files = sorted(scenes.rglob("*.png"))
    table = hugging_face(tmp_path / "t.parquet", [*(file.read_bytes() for file in files), None, b"no image"])
    outcome = ingest(source=table, store=tmp_path / "table")
    assert (outcome.seen, outcome.stored, outcome.failed) == (42, 40, 2)
    found = open_store(tmp_path / "table")
    np.testing.assert_array_equal(found.heads(), open_store(ingest.request.store).heads())
    assert found.failures()["error"].to_pylist() == ["the row holds no image", "not an image"]
    assert verify_sample(found, 5, "cpu").problems == ()


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_lists_name_files_beside_them_with_labels_and_columns(tmp_path: Path, kind: str) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).write_text(name)
    outside = tmp_path / "out.png"
    outside.write_text("o")
    table = pa.table({"path": ["in/b.png", f"file://{outside}", "gone.png"], "label": ["1", "2", None], "n": [3, 4, 5]})
    file = tmp_path / f"list.{kind}"
    if kind == "csv":
        file.write_text(f"path,label,n\nin/b.png,1,3\nfile://{outside},2,4\ngone.png,,5\n")
    else:
        pq.write_table(table, file)
    listing = list_source(file)
    assert [listing.place(at).read() for at in range(2)] == [b"b.png", b"o"]
    with pytest.raises(FileNotFoundError):
        listing.place(2).read()
    assert listing.labels.to_pylist() == ["1", "2", None]
    assert listing.extra.to_pydict() == {"n": [3, 4, 5]}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"x": [1]}, "has no column path or file_name or uri or url: it has x"),
        ({"path": ["a", "./a"]}, "names 'a' more than once"),
        ({"path": ["a", None]}, "names no file in row 1"),
        ({"uri": ["https://example.org/a.png"]}, "only local files can be read"),
        ({"path": ["a"], "batch": ["b"]}, "rename batch"),
        ({"path": pa.array([], pa.string())}, "lists nothing"),
        ({"image": pa.array([], pa.binary())}, "holds no rows"),
        ({"image": [b"x"], "sha256": ["y"]}, "rename sha256"),
    ],
)
def test_tables_that_cannot_be_understood_are_refused(tmp_path: Path, table: dict[str, object], message: str) -> None:
    pq.write_table(pa.table(table), tmp_path / "t.parquet")
    with pytest.raises(SourceError, match=message):
        list_source(tmp_path / "t.parquet")


def test_a_damaged_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(SourceError, match=r"t\.parquet cannot be read"):
        list_source(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").unlink()
    with pytest.raises(SourceError, match="does not exist"):
        list_source(tmp_path / "t.parquet")
