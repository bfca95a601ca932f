"""WebDataset tars: what is listed, what is said of it, and what is refused."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from schemas.errors import SourceError
from services.store import open_store
from services.verify import verify_sample
from tests.conftest import Ingest
from workers.sources.opening import list_source, place_of
from workers.sources.tars import expand


def write(file: Path, *members: tuple[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(file, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def said(**values: object) -> bytes:
    return json.dumps(values).encode()


def test_patterns_stand_for_files_in_order() -> None:
    assert [str(file) for file in expand("a-{08..11}.tar")] == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert [str(file) for file in expand("{0..1}/{2..3}.tar")] == ["0/2.tar", "0/3.tar", "1/2.tar", "1/3.tar"]
    assert expand("plain.tar") == [Path("plain.tar")]


def test_images_are_listed_with_what_is_said_of_them(tmp_path: Path) -> None:
    write(
        tmp_path / "s-0.tar",
        ("a/1.jpg", b"one"),
        ("a/1.json", said(year=1999, deep={"x": 1}, note="n")),
        ("a/1.cls", b"7\n"),
        ("a/2.x.png", b"two!"),
        ("a/2.txt", "ein Bär".encode()),
        ("a/2.npy", b"?"),
    )
    write(tmp_path / "s-1.tar", ("3.webp", b"3"), ("3.json", said(label=4, year=None)))
    listing = list_source(tmp_path / "s-{0..1}.tar")
    assert [listing.name(at) for at in range(3)] == ["s-0.tar/a/1.jpg", "s-0.tar/a/2.x.png", "s-1.tar/3.webp"]
    assert [listing.place(at).read() for at in (2, 0, 1)] == [b"3", b"one", b"two!"]
    assert listing.labels.to_pylist() == ["7", None, "4"]
    assert listing.extra.to_pydict() == {
        "year": [1999, None, None],
        "note": ["n", None, None],
        "txt": [None, "ein Bär", None],
    }
    assert listing.notes == ("1 members of the kind .npy were left out",)
    assert all(place_of(listing.place(at).source) == listing.place(at) for at in range(3))
    assert listing.digest() == list_source(tmp_path).digest(), "a folder of tars alone is a source of tars"
    write(tmp_path / "s-1.tar", ("3.webp", b"34"), ("3.json", said(label=4)))
    assert list_source(tmp_path).digest() != listing.digest()


@pytest.mark.parametrize("name", ["../../etc/passwd.jpg", "/etc/passwd.jpg", "..\\x.png"])
def test_a_name_that_points_outside_is_text_and_nothing_more(tmp_path: Path, name: str) -> None:
    place = list_source(write(tmp_path / "t.tar", (name, b"inside"))).place(0)
    assert place.read() == place_of(place.source).read() == b"inside"


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_failures_and_followed_nowhere(ingest: Ingest, tmp_path: Path, kind: bytes) -> None:
    file = tmp_path / "t.tar"
    with tarfile.open(file, "w") as tar:
        info = tarfile.TarInfo("link.png")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    outcome = ingest(source=file)
    assert (outcome.seen, outcome.failed) == (1, 1)
    assert open_store(ingest.request.store).failures()["error"].to_pylist() == ["not a regular file"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ((), "holds no images"),
        ((("a.json", b"{}"),), "holds no images"),
        ((("a.jpg", b"1"), ("a.jpg", b"2")), "holds 'a.jpg' twice"),
        ((("a.jpg", b"1"), ("a.json", b"{")), "a.json, which is no JSON"),
        ((("a.jpg", b"1"), ("a.txt", b"\xff")), "a.txt, which is no text"),
        ((("a.jpg", b"1"), ("a.json", said(sha256="x"))), "rename sha256"),
        (
            (("a.jpg", b"1"), ("a.json", said(x="x")), ("b.jpg", b"1"), ("b.json", said(x=2))),
            "says different kinds of things",
        ),
    ],
)
def test_tars_that_cannot_be_understood_are_refused(
    tmp_path: Path, members: tuple[tuple[str, bytes], ...], message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        list_source(write(tmp_path / "t.tar", *members))


def test_damaged_compressed_and_missing_tars_are_refused(tmp_path: Path) -> None:
    whole = write(tmp_path / "t.tar", ("a.jpg", b"x" * 5000), ("b.jpg", b"y" * 5000))
    whole.write_bytes(whole.read_bytes()[:7000])
    with pytest.raises(SourceError, match=r"t\.tar is no plain tar, or is damaged: unexpected end of data"):
        list_source(whole)
    with pytest.raises(SourceError, match="is no plain tar, or is damaged"):
        list_source(write(tmp_path / "z.tar", ("a.jpg", b"x"), mode="w:gz"))
    with pytest.raises(SourceError, match=r"s-1\.tar does not exist"):
        list_source(write(tmp_path / "s-0.tar", ("a.jpg", b"x")).with_name("s-{0..1}.tar"))
    write(tmp_path / "n-0.tar", ("a.jpg", b"x"), ("a.json", said(year=1)))
    write(tmp_path / "n-1.tar", ("b.jpg", b"x"), ("b.json", said(year="old")))
    with pytest.raises(SourceError, match="disagree on a column"):
        list_source(tmp_path / "n-{0..1}.tar")


def test_a_tar_gives_the_numbers_of_the_folder_it_was_made_of(ingest: Ingest, scenes: Path, tmp_path: Path) -> None:
    ingest()
    files = sorted(scenes.rglob("*.png"))
    for at, half in enumerate((files[:13], files[13:])):
        members = [(str(file.relative_to(scenes)), file.read_bytes()) for file in half]
        write(tmp_path / f"s-{at}.tar", *members)
    ingest(source=tmp_path / "s-{0..1}.tar", store=tmp_path / "tars")
    truth, found = open_store(ingest.request.store), open_store(tmp_path / "tars")
    np.testing.assert_array_equal(found.heads(), truth.heads())
    assert found.images()["sha256"] == truth.images()["sha256"]
    sample = verify_sample(found, 5, "cpu")
    assert (sample.images, sample.unavailable, sample.problems) == (5, 0, ())
    (tmp_path / "s-0.tar").unlink()
    assert 0 < verify_sample(found, 5, "cpu").unavailable < 5


def test_a_tar_that_changes_while_it_is_read_is_a_failure_and_no_other_picture(scenes: Path, tmp_path: Path) -> None:
    files = sorted(scenes.rglob("*.png"))[:4]
    tar = write(tmp_path / "t.tar", *((file.name, file.read_bytes()) for file in files))
    listing = list_source(tar)
    tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(OSError, match="ends before the member does"):
        listing.place(3).read()
