"""Tables of images: Parquet files that hold their bytes, as Hugging Face keeps them, and lists of files."""

import json
import os
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from schemas.errors import SourceError
from workers.sources.columns import LABEL, check_columns, concatenated
from workers.sources.listing import ENTRIES, Listing, as_text, image_column

_PATHS: Final = ("path", "file_name", "uri", "url")


def list_tables(root: Path, files: list[Path]) -> Listing:
    """The images in Parquet files: a column of bytes, or a struct with ``bytes``, makes a row an image.

    A ``label`` becomes the label, by the class names that the file knows; other columns of single values are kept.

    Raises:
        SourceError: a file cannot be read, or holds no images.
    """
    entries, labels, extras = [], [], []
    for number, file in enumerate(files):
        try:
            with pq.ParquetFile(file) as opened:
                schema = opened.schema_arrow
                image = image_column(schema)
                if image is None:
                    raise SourceError(f"{file} has no column of images: it has {', '.join(schema.names)}")
                kept = [field.name for field in schema if field.name != image and not pa.types.is_nested(field.type)]
                table = opened.read(columns=kept)
                rows = opened.metadata.num_rows
        except (OSError, pa.ArrowException) as error:
            raise SourceError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
        check_columns(file, kept)
        if LABEL in kept:
            labels.append(_labels(table[LABEL], _class_names(schema)))
            table = table.drop_columns([LABEL])
        else:
            labels.append(pa.nulls(rows, pa.string()))
        extras.append(table.replace_schema_metadata(None))
        name = as_text(os.fsencode(file.name))
        columns: dict[str, Any] = {
            "name": [f"{name}/{row:08d}" for row in range(rows)],
            "container": pa.repeat(pa.scalar(number, pa.int32()), rows),
            "offset": range(rows),
            "bytes": pa.repeat(pa.scalar(-1, pa.int64()), rows),
        }
        entries.append(pa.table(columns, schema=ENTRIES))
    table = pa.concat_tables(entries)
    if not table.num_rows:
        raise SourceError(f"{root} holds no rows, so there is nothing to ingest")
    return Listing(
        root.resolve(),
        tuple(file.resolve() for file in files),
        table,
        pa.concat_arrays(labels),
        concatenated(extras, files, table.num_rows),
    )


def list_files(file: Path) -> Listing:
    """The images that a CSV or Parquet file lists in a column path, file_name, uri or url, relative to its folder.

    Raises:
        SourceError: it cannot be read, has no such column, or names a file twice or on a network.
    """
    table = read_table(file, text_columns=(*_PATHS, LABEL))
    column = next((name for name in _PATHS if name in table.column_names), None)
    if column is None:
        raise SourceError(f"{file} has no column {' or '.join(_PATHS)}: it has {', '.join(table.column_names)}")
    check_columns(file, table.column_names)
    named = table[column].to_pylist()
    names = [_local(file, row, name) for row, name in enumerate(named)]
    if not names:
        raise SourceError(f"{file} lists nothing, so there is nothing to ingest")
    seen: set[bytes] = set()
    for name in names:
        if name in seen:
            raise SourceError(f"{file} names {os.fsdecode(name)!r} more than once")
        seen.add(name)
    root = file.resolve().parent
    sizes = [_size(os.path.join(os.fsencode(root), name)) for name in names]
    entries = {
        "name": [as_text(name) for name in names],
        "container": pa.nulls(len(names), pa.int32()),
        "offset": pa.nulls(len(names), pa.int64()),
        "bytes": sizes,
    }
    has_labels = LABEL in table.column_names
    labels = table[LABEL].combine_chunks() if has_labels else pa.nulls(len(names), pa.string())
    extra = table.drop_columns([column, LABEL] if has_labels else [column])
    return Listing(root, (), pa.table(entries, schema=ENTRIES), labels, concatenated([extra], [file], len(names)))


def read_table(file: Path, *, text_columns: tuple[str, ...]) -> pa.Table:
    """A Parquet or CSV file, some of whose columns are text whatever they look like.

    Raises:
        SourceError: it cannot be read.
    """
    texts = pyarrow.csv.ConvertOptions(
        column_types=dict.fromkeys(text_columns, pa.string()), strings_can_be_null=True, null_values=[""]
    )
    try:
        is_parquet = file.suffix == ".parquet"
        table = (
            pq.read_table(file, partitioning=None) if is_parquet else pyarrow.csv.read_csv(file, convert_options=texts)
        )
        names = table.column_names
        if len(set(names)) < len(names):
            return table  # whoever checks the columns says so
        for name in set(text_columns) & set(names):
            table = table.set_column(names.index(name), name, table[name].cast(pa.string()))
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise SourceError(f"{file} cannot be read: {str(error).splitlines()[0]}") from error
    return table.replace_schema_metadata(None)


def _local(file: Path, row: int, name: str | None) -> bytes:
    """A listed name as the path of a local file."""
    if not name:
        raise SourceError(f"{file} names no file in row {row}")
    scheme, colon, path = name.partition("://")
    if colon and scheme != "file":
        raise SourceError(f"{file} names {name!r}: only local files can be read")
    return os.path.normpath(os.fsencode(path if colon else name))


def _size(path: bytes) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1  # reading it will say why


def _class_names(schema: pa.Schema) -> list[str]:
    """What Hugging Face writes into a file's metadata of its label's numbers."""
    try:
        told = json.loads((schema.metadata or {})[b"huggingface"])
        names = told["info"]["features"][LABEL]["names"]
    except (KeyError, TypeError, ValueError):
        return []
    return [str(name) for name in names] if isinstance(names, list) else []


def _labels(column: pa.ChunkedArray, names: list[str]) -> pa.Array:
    values = column.combine_chunks()
    if names and pa.types.is_integer(values.type):
        texts = [None if at is None else names[at] if 0 <= at < len(names) else str(at) for at in values.to_pylist()]
        return pa.array(texts, pa.string())
    return values.cast(pa.string())
