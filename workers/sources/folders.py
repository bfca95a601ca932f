"""Folders: every file that is not hidden, with its sub-folder as label, and a table of metadata beside them."""

import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from schemas.errors import SourceError
from workers.sources.columns import LABEL, check_columns, no_columns
from workers.sources.listing import ENTRIES, Listing, as_text
from workers.sources.tables import read_table

METADATA: Final = ("metadata.parquet", "metadata.csv")
KEY: Final = "file_name"
_AT_ONCE: Final = 65_536  # names that are objects at one time


def list_folder(root: Path) -> Listing:
    """Every file below ``root`` that is not hidden, sorted by name.

    The first sub-folder of a file's path is its label. A ``metadata.parquet`` or ``metadata.csv`` at the root with a
    ``file_name`` column adds its other columns; a ``label`` there takes precedence. Links are followed.

    Raises:
        SourceError: the folder is missing, empty or unreadable, or its metadata does not fit.
    """
    found = _names(root)
    if not len(found):
        raise SourceError(f"{root} holds no files, so there is nothing to ingest")
    metadata, unmatched = _metadata(root, found)
    base = os.fsencode(root)
    columns: dict[str, pa.Array] = {"name": [], "bytes": [], "label": []}
    for start in range(0, len(found), _AT_ONCE):
        some = found.slice(start, _AT_ONCE).to_pylist()
        columns["name"].append(pa.array([as_text(path) for path in some], pa.string()))
        columns["bytes"].append(pa.array([_size(os.path.join(base, path)) for path in some], pa.int64()))
        folders = [as_text(path.split(b"/")[0]) if b"/" in path else None for path in some]
        columns["label"].append(pa.array(folders, pa.string()))
    names, sizes, labels = (pa.concat_arrays(parts) for parts in columns.values())
    if LABEL in metadata.column_names:
        labels = pc.coalesce(metadata[LABEL].combine_chunks(), labels)
        metadata = metadata.drop_columns([LABEL])
    nothing = pa.nulls(len(found), pa.int32()), pa.nulls(len(found), pa.int64())
    entries = pa.table([names, *nothing, sizes], schema=ENTRIES)
    notes = tuple(f"the metadata names {name!r}, which is not in the folder" for name in unmatched)
    return Listing(root.resolve(), (), entries, labels, metadata, notes)


def _names(root: Path) -> pa.Array:
    """The paths below ``root`` in order, as the file system spells them."""
    parts, some = [], []
    for path in _walk(os.fsencode(root)):
        if os.fsdecode(path) not in METADATA:
            some.append(path)
        if len(some) == _AT_ONCE:
            parts.append(pa.array(some, pa.binary()))
            some = []
    found = pa.concat_arrays([*parts, pa.array(some, pa.binary())])
    return found.take(pc.sort_indices(found))


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


def _metadata(root: Path, found: pa.Array) -> tuple[pa.Table, list[str]]:
    """The metadata's columns, one row per found file, and the names that match no file."""
    present = [root / name for name in METADATA if (root / name).is_file()]
    if not present:
        return no_columns(len(found)), []
    if len(present) > 1:
        raise SourceError(f"{root} holds both {' and '.join(METADATA)}: keep one")
    table = read_table(present[0], text_columns=(KEY, LABEL))
    if KEY not in table.column_names:
        raise SourceError(f"{present[0]} has no column {KEY!r}; it has {', '.join(table.column_names)}")
    check_columns(present[0], table.column_names)
    named = [None if name is None else os.fsencode(posixpath.normpath(name)) for name in table[KEY].to_pylist()]
    names = pa.array(named, pa.binary())
    counts = pc.value_counts(names)
    twice = [item["values"] for item in counts.filter(pc.greater(counts.field("counts"), 1)).to_pylist()]
    if twice:
        raise SourceError(f"{present[0]} names {os.fsdecode(twice[0]) if twice[0] else None!r} more than once")
    order = pc.index_in(found, value_set=names)
    unmatched = names.filter(pc.invert(pc.is_in(names, value_set=found)))
    return table.drop_columns([KEY]).take(order), sorted(
        "None" if name is None else os.fsdecode(name) for name in unmatched.to_pylist()
    )
