"""The images of a source, listed and not yet read: columns, not objects, so that millions of names are no burden.

An image is a file, a range of bytes of one (a member of a tar), or a row of a table.
"""

import hashlib
import json
import os
import re
import stat
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

MAX_FILE_BYTES: Final = 1024**3

_ESCAPE: Final = re.compile(rb"\\(\\|x[0-9a-f]{2})")
INNER: Final = "::"  # between a container and what lies in it
_DIGEST_ROWS: Final = 65_536
_OPEN_GROUPS: Final = 8  # of Parquet row groups: decoding threads are never far from one another

ENTRIES: Final = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),  # unique in the source
        pa.field("container", pa.int32()),  # which file holds it; null where it is a file itself
        pa.field("offset", pa.int64()),  # the member's first byte, or the table's row
        pa.field("bytes", pa.int64(), nullable=False),  # -1 where it is not known
    ]
)


class UnreadableError(OSError):
    """An image whose bytes cannot be had."""


class Place(Protocol):
    """Where one image lies."""

    @property
    def source(self) -> str:
        """The place as text, as the image table shows it; `workers.sources.opening.place_of` reads it back."""
        ...

    def read(self) -> bytes:
        """The image's bytes, at most one more than `MAX_FILE_BYTES`.

        Raises:
            OSError: they cannot be read.
        """
        ...


@dataclass(frozen=True)
class FileImage:
    """A file."""

    path: bytes

    @property
    def source(self) -> str:
        """See `Place`."""
        return as_text(self.path)

    def read(self) -> bytes:
        """See `Place`."""
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            raise UnreadableError("not a regular file")  # reading a pipe or a device may not end
        with open(self.path, "rb") as file:
            return file.read(MAX_FILE_BYTES + 1)


@dataclass(frozen=True)
class MemberImage:
    """A member of a tar, read without unpacking."""

    container: Path
    member: str  # as `as_text` writes it
    offset: int  # -1 for a member that is a link or a device, and holds nothing
    size: int

    @property
    def source(self) -> str:
        """See `Place`."""
        return f"{as_text(os.fsencode(self.container))}{INNER}{self.member}"

    def read(self) -> bytes:
        """See `Place`."""
        if self.offset < 0:
            raise UnreadableError("not a regular file")
        with self.container.open("rb") as file:
            file.seek(self.offset)
            data = file.read(min(self.size, MAX_FILE_BYTES + 1))
        if len(data) < min(self.size, MAX_FILE_BYTES + 1):
            raise UnreadableError(f"{self.container.name} ends before the member does")
        return data


@dataclass(frozen=True)
class RowImage:
    """A row of a Parquet file that holds the bytes of images."""

    container: Path
    row: int

    @property
    def source(self) -> str:
        """See `Place`."""
        return f"{as_text(os.fsencode(self.container))}{INNER}{self.row}"

    def read(self) -> bytes:
        """See `Place`."""
        starts = _group_starts(self.container)
        group = next(at for at in range(len(starts) - 1) if starts[at + 1] > self.row)
        value = _group(self.container, group)[self.row - starts[group]].as_py()
        if value is None:
            raise UnreadableError("the row holds no image")
        data: bytes = value
        return data


@dataclass(frozen=True)
class Listing:
    """The images of a source, in a fixed order."""

    root: Path
    containers: tuple[Path, ...]  # tars or Parquet files; none where every image is a file
    entries: pa.Table  # of ENTRIES
    labels: pa.Array
    extra: pa.Table  # one row per image
    notes: tuple[str, ...] = ()  # what was left out, in words

    def __len__(self) -> int:
        return int(self.entries.num_rows)

    def name(self, index: int) -> str:
        """What one image is called, different for different images."""
        name: str = self.entries["name"][index].as_py()
        return name

    def names(self, rows: range) -> list[str]:
        """What some images in a row are called."""
        found: list[str] = self.entries["name"].slice(rows.start, len(rows)).to_pylist()
        return found

    def place(self, index: int) -> Place:
        """Where one image lies."""
        name = self.name(index)
        container = self.entries["container"][index].as_py()
        if container is None:
            return FileImage(os.path.join(os.fsencode(self.root), as_path(name)))
        file, offset = self.containers[container], self.entries["offset"][index].as_py()
        if file.suffix == ".parquet":
            return RowImage(file, offset)
        return MemberImage(file, name.partition("/")[2], offset, self.entries["bytes"][index].as_py())

    def digest(self) -> str:
        """SHA-256 of all names, sizes, labels and extra columns, in order."""
        found = hashlib.sha256()
        found.update(json.dumps([[field.name, str(field.type)] for field in self.extra.schema]).encode())
        for start in range(0, len(self), _DIGEST_ROWS):
            some = [self.entries[name].slice(start, _DIGEST_ROWS).to_pylist() for name in ("name", "bytes")]
            some.append(self.labels.slice(start, _DIGEST_ROWS).to_pylist())
            some += [column.slice(start, _DIGEST_ROWS).to_pylist() for column in self.extra.columns]
            found.update(json.dumps(some, default=str).encode())
        return found.hexdigest()


def as_text(path: bytes) -> str:
    r"""A path as text: bytes that are no UTF-8 become ``\\xNN``, and a backslash of the name's own is doubled.

    So does a ``::``, which stands between a container and what lies in it.
    """
    text = path.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
    return text.replace(INNER, r"\x3a\x3a")


def as_path(text: str) -> bytes:
    """The path that `as_text` wrote."""
    return _ESCAPE.sub(
        lambda found: b"\\" if found[1] == b"\\" else bytes.fromhex(found[1][1:].decode()), text.encode()
    )


def image_column(schema: pa.Schema) -> str | None:
    """The column of a table that holds the bytes of images: of its own, or in a struct with ``bytes``."""
    for field in schema:
        inner = [field.type.field(at).name for at in range(field.type.num_fields)] if _is_struct(field.type) else []
        if "bytes" in inner or pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            return str(field.name)
    return None


def _is_struct(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind))


@lru_cache(maxsize=1024)
def _group_starts(file: Path) -> tuple[int, ...]:
    """The first row of each row group, and one past the last."""
    metadata = pq.read_metadata(file)
    starts = [0]
    for group in range(metadata.num_row_groups):
        starts.append(starts[-1] + metadata.row_group(group).num_rows)
    return tuple(starts)


@lru_cache(maxsize=_OPEN_GROUPS)
def _group(file: Path, group: int) -> pa.ChunkedArray:
    """The bytes of the images of one row group."""
    try:
        with pq.ParquetFile(file) as opened:
            name = image_column(opened.schema_arrow)
            table = opened.read_row_group(group, columns=[name])
    except pa.ArrowException as error:
        raise UnreadableError(f"{file.name} cannot be read: {error}") from error
    column = table[name]
    return pa.chunked_array([chunk.field("bytes") for chunk in column.chunks]) if _is_struct(column.type) else column
