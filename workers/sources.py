"""Image folders: which files there are, in a fixed order, with labels and extra columns."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.csv as pc
import pyarrow.parquet as pq

from schemas.errors import SourceError
from schemas.tables import IMAGE_COLUMNS

METADATA: Final = ("metadata.parquet", "metadata.csv")
KEY: Final = "file_name"


@dataclass(frozen=True)
class Listing:
    """The images of a source, listed and not yet read."""

    root: Path
    paths: tuple[bytes, ...]  # relative to the root, as the file system spells them
    labels: pa.Array
    extra: pa.Table  # one row per path
    unmatched: tuple[str, ...] = ()  # names that the metadata knows and the folder does not

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        r"""The path of one image as text; bytes that are no UTF-8 are written ``\\xNN``."""
        return self.paths[index].decode("utf-8", "backslashreplace")

    def path(self, index: int) -> bytes:
        """Where one image lies."""
        return os.path.join(os.fsencode(self.root), self.paths[index])

    def digest(self) -> str:
        """SHA-256 of all names, labels and extra columns, in order."""
        found = hashlib.sha256()
        found.update(json.dumps([[field.name, str(field.type)] for field in self.extra.schema]).encode())
        rows = (row for part in self.extra.to_batches(max_chunksize=4096) for row in part.to_pylist())
        for index, label in enumerate(self.labels.to_pylist()):
            row = next(rows) if self.extra.num_columns else {}
            found.update(json.dumps([self.paths[index].hex(), label, row], default=str).encode())
        return found.hexdigest()


def list_folder(root: Path) -> Listing:
    """Every file below ``root`` that is not hidden, sorted by name.

    The first sub-folder of a file's path is its label. A ``metadata.parquet`` or ``metadata.csv`` at the root with a
    ``file_name`` column adds its other columns; a ``label`` there takes precedence.

    Raises:
        SourceError: the folder is missing, empty or unreadable, or its metadata does not fit.
    """
    if not root.is_dir():
        what = "is a file; a source is a folder of images" if root.exists() else "does not exist"
        raise SourceError(f"{root} {what}")
    found = sorted(path for path in _walk(os.fsencode(root)) if os.fsdecode(path) not in METADATA)
    if not found:
        raise SourceError(f"{root} holds no files, so there is nothing to ingest")
    metadata, unmatched = _metadata(root, found)
    folders = [path.split(b"/")[0].decode("utf-8", "backslashreplace") if b"/" in path else None for path in found]
    labels = pa.array(folders, pa.string())
    if "label" in metadata.column_names:
        given = metadata["label"].cast(pa.string()).combine_chunks()
        labels = pa.compute.coalesce(given, labels)
        metadata = metadata.drop_columns(["label"])
    _check_columns(root, metadata.schema)
    return Listing(root.resolve(), tuple(found), labels, metadata, unmatched)


def _walk(root: bytes) -> Iterator[bytes]:
    def refused(error: OSError) -> None:
        raise SourceError(f"cannot list {error.filename!r}: {error.strerror}") from error

    for folder, inner, files in os.walk(root, onerror=refused):
        inner[:] = sorted(name for name in inner if not name.startswith(b"."))
        below = os.path.relpath(folder, root)
        for name in files:
            if not name.startswith(b"."):
                yield name if below == b"." else os.path.join(below, name)


def _metadata(root: Path, found: list[bytes]) -> tuple[pa.Table, tuple[str, ...]]:
    """The metadata's columns, one row per found file, and the names that match no file."""
    present = [root / name for name in METADATA if (root / name).is_file()]
    if not present:
        return pa.table({"": pa.nulls(len(found))}).drop_columns([""]), ()
    if len(present) > 1:
        raise SourceError(f"{root} holds both {' and '.join(METADATA)}: keep one")
    table = _read(present[0])
    names = table[KEY].to_pylist()
    rows = {name: row for row, name in enumerate(names)}
    if len(rows) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise SourceError(f"{present[0]} names {twice!r} more than once")
    files = {os.fsdecode(path): index for index, path in enumerate(found)}
    order = pa.array([rows.get(name) for name in files], pa.int64())
    return table.drop_columns([KEY]).take(order), tuple(sorted(str(name) for name in rows.keys() - files.keys()))


def _read(file: Path) -> pa.Table:
    try:
        table = pq.read_table(file, partitioning=None) if file.suffix == ".parquet" else pc.read_csv(file)
    except (OSError, pa.ArrowInvalid) as error:
        raise SourceError(f"{file} cannot be read: {error}") from error
    if KEY not in table.column_names:
        raise SourceError(f"{file} has no column {KEY!r}; it has {', '.join(table.column_names)}")
    return table


def _check_columns(root: Path, schema: pa.Schema) -> None:
    reserved = sorted(set(schema.names) & set(IMAGE_COLUMNS.names))
    if reserved:
        raise SourceError(
            f"the metadata of {root} has columns that the store fills itself: rename {', '.join(reserved)}"
        )
    if len(set(schema.names)) < len(schema.names):
        raise SourceError(f"the metadata of {root} has two columns of one name")


def is_regular(path: bytes) -> bool:
    """Whether reading the path ends: a pipe or a device may not."""
    return stat.S_ISREG(os.stat(path).st_mode)
