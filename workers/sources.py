"""Image folders: which files there are, in a fixed order, with labels and extra columns."""

import hashlib
import json
import os
import posixpath
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from schemas.errors import SourceError
from schemas.tables import IMAGE_COLUMNS

METADATA: Final = ("metadata.parquet", "metadata.csv")
KEY: Final = "file_name"
LABEL: Final = "label"
_ESCAPE: Final = re.compile(rb"\\(\\|x[0-9a-f]{2})")


@dataclass(frozen=True)
class ImageFile:
    """One listed file."""

    path: bytes  # relative to the root, as the file system spells it
    bytes: int  # -1 where the path leads nowhere


@dataclass(frozen=True)
class Listing:
    """The images of a source, listed and not yet read."""

    root: Path
    files: tuple[ImageFile, ...]
    labels: pa.Array
    extra: pa.Table  # one row per file
    unmatched: tuple[str, ...] = ()  # names that the metadata knows and the folder does not

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """The relative path of one image as text, different for different paths."""
        return as_text(self.files[index].path)

    def path(self, index: int) -> bytes:
        """Where one image lies."""
        return os.path.join(os.fsencode(self.root), self.files[index].path)

    def digest(self) -> str:
        """SHA-256 of all names, sizes, labels and extra columns, in order."""
        found = hashlib.sha256()
        found.update(json.dumps([[field.name, str(field.type)] for field in self.extra.schema]).encode())
        rows = (row for part in self.extra.to_batches(max_chunksize=4096) for row in part.to_pylist())
        for file, label in zip(self.files, self.labels.to_pylist(), strict=True):
            row = next(rows) if self.extra.num_columns else {}
            found.update(json.dumps([file.path.hex(), file.bytes, label, row], default=str).encode())
        return found.hexdigest()


def as_text(path: bytes) -> str:
    r"""A path as text: bytes that are no UTF-8 become ``\\xNN``, and a backslash of the name's own is doubled."""
    return path.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def as_path(text: str) -> bytes:
    """The path that `as_text` wrote."""
    return _ESCAPE.sub(
        lambda found: b"\\" if found[1] == b"\\" else bytes.fromhex(found[1][1:].decode()), text.encode()
    )


def list_folder(root: Path) -> Listing:
    """Every file below ``root`` that is not hidden, sorted by name.

    The first sub-folder of a file's path is its label. A ``metadata.parquet`` or ``metadata.csv`` at the root with a
    ``file_name`` column adds its other columns; a ``label`` there takes precedence. Links are followed.

    Raises:
        SourceError: the folder is missing, empty or unreadable, or its metadata does not fit.
    """
    if not root.is_dir():
        what = "is a file; a source is a folder of images" if root.exists() else "does not exist"
        raise SourceError(f"{root} {what}")
    base = os.fsencode(root)
    found = sorted(path for path in _walk(base) if os.fsdecode(path) not in METADATA)
    if not found:
        raise SourceError(f"{root} holds no files, so there is nothing to ingest")
    metadata, unmatched = _metadata(root, found)
    labels = pa.array([as_text(path.split(b"/")[0]) if b"/" in path else None for path in found], pa.string())
    if LABEL in metadata.column_names:
        labels = pc.coalesce(metadata[LABEL].combine_chunks(), labels)
        metadata = metadata.drop_columns([LABEL])
    files = tuple(ImageFile(path, _size(os.path.join(base, path))) for path in found)
    return Listing(root.resolve(), files, labels, metadata, unmatched)


def is_regular(path: bytes) -> bool:
    """Whether reading the path ends: a pipe or a device may not."""
    return stat.S_ISREG(os.stat(path).st_mode)


def _walk(root: bytes) -> Iterator[bytes]:
    def refused(error: OSError) -> None:
        raise SourceError(f"cannot list {error.filename!r}: {error.strerror}") from error

    entered = {os.path.realpath(root)}
    for folder, inner, files in os.walk(root, onerror=refused, followlinks=True):
        inner[:] = [name for name in inner if not name.startswith(b".")]
        links = [os.path.join(folder, name) for name in inner if os.path.islink(os.path.join(folder, name))]
        for link in links:
            target = os.path.realpath(link)
            if any(
                place == target or place.startswith(target + b"/") for place in entered | {os.path.realpath(folder)}
            ):
                raise SourceError(f"{os.fsdecode(link)} leads back to a folder that is listed already: remove the link")
            entered.add(target)
        below = os.path.relpath(folder, root)
        for name in files:
            if not name.startswith(b"."):
                yield name if below == b"." else os.path.join(below, name)


def _size(path: bytes) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1  # a link to nowhere: reading it will say so


def _metadata(root: Path, found: list[bytes]) -> tuple[pa.Table, tuple[str, ...]]:
    """The metadata's columns, one row per found file, and the names that match no file."""
    present = [root / name for name in METADATA if (root / name).is_file()]
    if not present:
        return pa.table({"": pa.nulls(len(found))}).drop_columns([""]), ()
    if len(present) > 1:
        raise SourceError(f"{root} holds both {' and '.join(METADATA)}: keep one")
    table = _read(present[0])
    names = [None if name is None else posixpath.normpath(name) for name in table[KEY].to_pylist()]
    rows: dict[str | None, int] = {}
    for row, name in enumerate(names):
        if name in rows:
            raise SourceError(f"{present[0]} names {name!r} more than once")
        rows[name] = row
    order = [rows.get(os.fsdecode(path)) for path in found]
    unmatched = rows.keys() - {os.fsdecode(path) for path in found}
    return table.drop_columns([KEY]).take(pa.array(order, pa.int64())), tuple(sorted(map(str, unmatched)))


def _read(file: Path) -> pa.Table:
    texts = pyarrow.csv.ConvertOptions(
        column_types={KEY: pa.string(), LABEL: pa.string()}, strings_can_be_null=True, null_values=[""]
    )
    try:
        is_parquet = file.suffix == ".parquet"
        table = (
            pq.read_table(file, partitioning=None) if is_parquet else pyarrow.csv.read_csv(file, convert_options=texts)
        )
        _check_columns(file, table.column_names)
        for name in {KEY, LABEL} & set(table.column_names):
            place = table.column_names.index(name)
            table = table.set_column(place, name, table[name].cast(pa.string()))
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise SourceError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    return table


def _check_columns(file: Path, names: list[str]) -> None:
    if KEY not in names:
        raise SourceError(f"{file} has no column {KEY!r}; it has {', '.join(names)}")
    if len(set(names)) < len(names):
        raise SourceError(f"{file} has two columns called {next(name for name in names if names.count(name) > 1)!r}")
    reserved = sorted((set(names) & set(IMAGE_COLUMNS.names)) - {LABEL})
    if reserved:
        raise SourceError(f"{file} has columns that the store fills itself: rename {', '.join(reserved)}")
