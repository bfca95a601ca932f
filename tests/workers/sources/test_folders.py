import gc
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import SourceError
from workers.sources.folders import list_folder
from workers.sources.listing import as_path
from workers.sources.opening import list_source, place_of


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")


def test_files_are_listed_in_order_with_their_folder_as_label(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.png", "a/x/1.png", "c.png", ".hidden/3.png", "a/.hidden.png")
    listing = list_folder(tmp_path)
    assert [listing.name(i) for i in range(len(listing))] == ["a/x/1.png", "b/2.png", "c.png"]
    assert listing.labels.to_pylist() == ["a", "b", None]


def test_names_may_be_any_bytes(tmp_path: Path) -> None:
    touch(tmp_path, "mit Leerzeichen.png", "日本.png")
    with open(os.path.join(os.fsencode(tmp_path), b"\xff.png"), "wb"):  # noqa: PTH118, PTH123
        pass
    listing = list_folder(tmp_path)
    names = [listing.name(i) for i in range(3)]
    assert names == ["mit Leerzeichen.png", "日本.png", "\\xff.png"]
    assert [as_path(name) for name in names] == [name.encode() for name in names[:2]] + [b"\xff.png"]
    assert [listing.place(i).read() for i in range(3)] == [b"x", b"x", b""]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_metadata_adds_columns_and_labels(tmp_path: Path, kind: str) -> None:
    touch(tmp_path, "a/1.png", "a/2.png", "3.png")
    table = pa.table({"file_name": ["3.png", "a/1.png", "gone.png"], "label": ["l3", None, "l"], "year": [3, 1, 9]})
    if kind == "parquet":
        pq.write_table(table, tmp_path / "metadata.parquet")
    else:
        (tmp_path / "metadata.csv").write_text("file_name,label,year\n3.png,l3,3\na/1.png,,1\ngone.png,l,9\n")
    listing = list_folder(tmp_path)
    assert listing.extra.column_names == ["year"]
    assert listing.extra["year"].to_pylist() == [3, 1, None]
    assert listing.notes == ("the metadata names 'gone.png', which is not in the folder",)
    assert listing.labels.to_pylist() == ["l3", "a", "a"]


def test_the_digest_changes_with_names_labels_and_columns(tmp_path: Path) -> None:
    touch(tmp_path, "a/1.png")
    digests = [list_folder(tmp_path).digest()]
    assert list_folder(tmp_path).digest() == digests[0]
    for text in ("file_name,x\na/1.png,1\n", "file_name,x\na/1.png,2\n", "file_name,label\na/1.png,b\n"):
        (tmp_path / "metadata.csv").write_text(text)
        digests.append(list_folder(tmp_path).digest())
    (tmp_path / "metadata.csv").unlink()
    touch(tmp_path, "a/2.png")
    digests.append(list_folder(tmp_path).digest())
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("name\nx\n", "no column 'file_name'"),
        ("file_name,sha256\na.png,1\n", "rename sha256"),
        ("file_name,x\na.png,1\na.png,2\n", "more than once"),
        ("file_name,x\na.png\n", "cannot be read"),
        ("file_name,x,x\na.png,1,2\n", "two columns called 'x'"),
        ("file_name,file_name\na.png,1\n", "two columns called 'file_name'"),
        (b"file_name,caf\xe9\na.png,\xe9\n", "cannot be read"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(tmp_path: Path, metadata: str | bytes, message: str) -> None:
    touch(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_bytes(metadata.encode() if isinstance(metadata, str) else metadata)
    with pytest.raises(SourceError, match=message):
        list_folder(tmp_path)


def test_two_metadata_files_are_refused(tmp_path: Path) -> None:
    touch(tmp_path, "a.png", "metadata.csv", "metadata.parquet")
    with pytest.raises(SourceError, match="keep one"):
        list_folder(tmp_path)


def test_an_empty_a_missing_and_no_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="nothing to ingest"):
        list_folder(tmp_path)
    with pytest.raises(SourceError, match="does not exist"):
        list_source(tmp_path / "x")
    touch(tmp_path, "f")
    with pytest.raises(SourceError, match="is a file that is no source: give a folder, tars"):
        list_source(tmp_path / "f")


def test_names_and_labels_that_look_like_numbers_stay_text(tmp_path: Path) -> None:
    touch(tmp_path, "0001", "a/0002")
    (tmp_path / "metadata.csv").write_text("file_name,label\n0001,007\n./a/0002,True\n")
    listing = list_folder(tmp_path)
    assert listing.labels.to_pylist() == ["007", "True"]
    assert listing.notes == ()


@pytest.mark.parametrize("column", [pa.array([[1]]), pa.array([{"a": 1}])])
def test_labels_that_are_no_text_are_refused(tmp_path: Path, column: pa.Array) -> None:
    touch(tmp_path, "a.png")
    pq.write_table(pa.table({"file_name": ["a.png"], "label": column}), tmp_path / "metadata.parquet")
    with pytest.raises(SourceError, match="cannot be read"):
        list_folder(tmp_path)


def test_linked_folders_are_listed_and_circles_refused(tmp_path: Path) -> None:
    touch(tmp_path, "else/1.png", "source/a/2.png")
    (tmp_path / "source" / "b").symlink_to(tmp_path / "else")
    listing = list_folder(tmp_path / "source")
    assert [listing.name(i) for i in range(len(listing))] == ["a/2.png", "b/1.png"]
    (tmp_path / "source" / "c").symlink_to(tmp_path / "source")
    with pytest.raises(SourceError, match="leads back"):
        list_folder(tmp_path / "source")


def test_the_digest_changes_with_sizes(tmp_path: Path) -> None:
    touch(tmp_path, "a.png")
    before = list_folder(tmp_path).digest()
    (tmp_path / "a.png").write_bytes(b"xy")
    assert list_folder(tmp_path).digest() != before


def test_a_name_like_that_of_a_member_is_read_back(tmp_path: Path) -> None:
    touch(tmp_path, "a.tar::b.png")
    place = list_folder(tmp_path).place(0)
    assert place_of(place.source) == place
    assert place.read() == b"x"


def test_ten_thousand_names_are_columns_and_no_objects(tmp_path: Path) -> None:
    for folder in range(10):
        (tmp_path / f"{folder}").mkdir()
        for file in range(1000):
            (tmp_path / f"{folder}/{file:04d}").touch()
    before = len(gc.get_objects())
    listing = list_folder(tmp_path)
    assert len(listing) == 10_000
    assert len(gc.get_objects()) - before < 1000
    assert [listing.name(at) for at in (0, 9_999)] == ["0/0000", "9/0999"]
