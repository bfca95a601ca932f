"""Which kind of source a path names."""

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import SourceError
from workers.sources.folders import METADATA, list_folder
from workers.sources.listing import (
    INNER,
    FileImage,
    Listing,
    MemberImage,
    Place,
    RowImage,
    UnreadableError,
    as_path,
    as_text,
    image_column,
)
from workers.sources.tables import list_files, list_tables
from workers.sources.tars import expand, list_tars, members


def list_source(source: Path) -> Listing:
    """The images of a folder, of tars, of Parquet files that hold images, or of a list of files in CSV or Parquet.

    Several tars or Parquet files are a folder of nothing else, or a pattern like ``shard-{000..999}.tar``.

    Raises:
        SourceError: there is no such thing, or it cannot be read.
    """
    if source.is_dir():
        files = sorted(file for file in source.iterdir() if not file.name.startswith("."))
        for kind, read in ((".tar", list_tars), (".parquet", list_tables)):
            if files and all(file.suffix == kind and file.is_file() and file.name not in METADATA for file in files):
                return read(source, files)
        return list_folder(source)
    if "{" in source.name or source.suffix == ".tar":
        files = expand(str(source))
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise SourceError(f"{missing[0]} does not exist")
        return list_tars(source.parent, files) if files[0].suffix == ".tar" else list_tables(source.parent, files)
    if not source.exists():
        raise SourceError(f"{source} does not exist")
    if source.suffix == ".parquet":
        return list_tables(source.parent, [source]) if _holds_images(source) else list_files(source)
    if source.suffix == ".csv":
        return list_files(source)
    raise SourceError(f"{source} is a file that is no source: give a folder, tars, Parquet files, or a list in CSV")


def place_of(source: str) -> Place:
    """The place that an image table's ``source`` tells.

    Raises:
        OSError: its container is gone, or does not hold it.
    """
    container, inner, name = source.rpartition(INNER)
    if not inner:
        return FileImage(as_path(source))
    file = Path(os.fsdecode(as_path(container)))
    if file.suffix == ".parquet":
        return RowImage(file, int(name))
    for member in members(file):
        if as_text(os.fsencode(member.name)) == name:
            return MemberImage(file, name, member.offset_data if member.isreg() else -1, member.size)
    raise UnreadableError(f"{file} no longer holds {name}")


def _holds_images(file: Path) -> bool:
    try:
        return image_column(pq.read_schema(file)) is not None
    except (OSError, pa.ArrowException) as error:
        raise SourceError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
