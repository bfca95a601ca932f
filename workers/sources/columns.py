"""Columns that a source says of its images beside the store's own."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from schemas.errors import SourceError
from schemas.tables import IMAGE_COLUMNS

LABEL: Final = "label"


def check_columns(file: Path, names: list[str]) -> None:
    """Makes sure that columns have names of their own.

    Raises:
        SourceError: two are called alike, or one as a column that the store fills.
    """
    if len(set(names)) < len(names):
        raise SourceError(f"{file} has two columns called {next(name for name in names if names.count(name) > 1)!r}")
    reserved = sorted((set(names) & set(IMAGE_COLUMNS.names)) - {LABEL})
    if reserved:
        raise SourceError(f"{file} has columns that the store fills itself: rename {', '.join(reserved)}")


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that fit a column: text, numbers, truth; a label is text."""
    kept = {name: value for name, value in values.items() if isinstance(value, str | int | float | bool)}
    if LABEL in kept:
        kept[LABEL] = str(kept[LABEL])
    return kept


def gathered(file: Path, rows: list[dict[str, Any]]) -> pa.Table:
    """What is said of each image as columns, in the order in which they first appear.

    Raises:
        SourceError: a column is text here and a number there.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        return pa.table({name: [row.get(name) for row in rows] for name in names}) if names else no_columns(len(rows))
    except pa.ArrowException as error:
        raise SourceError(f"{file} says different kinds of things of its images: {error}") from error


def concatenated(tables: list[pa.Table], files: Iterable[Path], rows: int) -> pa.Table:
    """Tables of several files below each other, columns that one lacks being null.

    Raises:
        SourceError: a column is text in one and a number in another.
    """
    try:
        table = pa.concat_tables(tables, promote_options="permissive").combine_chunks()
    except pa.ArrowException as error:
        raise SourceError(f"{next(iter(files))} and the others disagree on a column: {error}") from error
    return table if table.num_columns else no_columns(rows)


def no_columns(rows: int) -> pa.Table:
    """So many rows of nothing."""
    return pa.table({"": pa.nulls(rows)}).drop_columns([""])
