"""WebDataset tars: images with what is said of them in files of the same name beside them.

A tar's headers are read once; its images are then read where they lie, in any order, by any number of threads. Nothing
is unpacked, so a member's name is text and no path, and a link leads nowhere.
"""

import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from schemas.errors import SourceError
from workers.sources.columns import check_columns, concatenated, gathered, plain
from workers.sources.listing import ENTRIES, Listing, as_text

_IMAGES: Final = frozenset(
    {"avif", "bmp", "dib", "gif", "jp2", "jpe", "jpeg", "jpg", "pbm", "pgm", "png", "pnm", "ppm", "qoi", "tga"}
    | {"tif", "tiff", "webp"}
)
_SPAN: Final = re.compile(r"\{(\d+)\.\.(\d+)\}")
_SIDE_BYTES: Final = 1024**2  # of a file that says something of an image


def expand(pattern: str) -> list[Path]:
    """The files that ``shard-{000..999}.tar`` stands for, in order."""
    span = _SPAN.search(pattern)
    if span is None:
        return [Path(pattern)]
    first, last, width = int(span[1]), int(span[2]), len(span[1])
    numbers = range(first, last + 1)
    return [
        file for at in numbers for file in expand(f"{pattern[: span.start()]}{at:0{width}d}{pattern[span.end() :]}")
    ]


def list_tars(root: Path, files: list[Path]) -> Listing:
    """The images in tars.

    Members ``KEY.json``, ``KEY.txt`` and ``KEY.cls`` speak of the image ``KEY.jpg``: the scalar values of the first
    become columns, the text a column ``txt``, the class the label.

    Raises:
        SourceError: a tar is missing, damaged or compressed, holds a name twice, or no image is in any.
    """
    if not files:
        raise SourceError(f"{root} names no tars")
    entries, labels, extras = [], [], []
    left_out: Counter[str] = Counter()
    for number, file in enumerate(files):
        listed, said = _read(file, left_out)
        entries.append(_entries(file, number, listed))
        sides = [said.get(_key(member.name), {}) for member in listed]
        labels += [side.pop("label", None) for side in sides]
        extras.append(gathered(file, sides))
    table = pa.concat_tables(entries)
    if not table.num_rows:
        raise SourceError(
            f"{files[0]} and {len(files) - 1} more hold no images" if files[1:] else f"{files[0]} holds no images"
        )
    extra = concatenated(extras, files, table.num_rows)
    check_columns(files[0], extra.column_names)
    notes = tuple(f"{count} members of the kind .{kind} were left out" for kind, count in sorted(left_out.items()))
    return Listing(
        root.resolve(), tuple(file.resolve() for file in files), table, pa.array(labels, pa.string()), extra, notes
    )


def members(file: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar that are no folders.

    Raises:
        SourceError: it is no tar, or is cut short.
    """
    try:
        with tarfile.open(file, "r:") as opened:
            for member in opened:
                if not member.isdir():
                    yield member
    except tarfile.TarError as error:
        raise SourceError(f"{file} is no plain tar, or is damaged: {error}") from error
    except OSError as error:
        raise SourceError(f"{file} cannot be read: {error.strerror or error}") from error


def _read(file: Path, left_out: Counter[str]) -> tuple[list[tarfile.TarInfo], dict[str, dict[str, Any]]]:
    """The images of one tar, in its order, and what is said of each key."""
    images: list[tarfile.TarInfo] = []
    said: dict[str, dict[str, Any]] = {}
    names: set[str] = set()
    with file.open("rb") as raw:
        for member in members(file):
            if member.name in names:
                raise SourceError(f"{file} holds {member.name!r} twice")
            names.add(member.name)
            kind = member.name.rpartition(".")[2].lower()
            if kind in _IMAGES:
                images.append(member)
            elif kind in ("json", "txt", "cls") and member.isreg() and member.size <= _SIDE_BYTES:
                raw.seek(member.offset_data)
                side = said.setdefault(_key(member.name), {})
                side.update(_said(file, member.name, kind, raw.read(member.size)))
            else:
                left_out[kind] += 1
    return images, said


def _entries(file: Path, number: int, listed: list[tarfile.TarInfo]) -> pa.Table:
    return pa.table(
        {
            "name": [f"{as_text(os.fsencode(file.name))}/{as_text(os.fsencode(member.name))}" for member in listed],
            "container": [number] * len(listed),
            "offset": [member.offset_data if member.isreg() else -1 for member in listed],
            "bytes": [member.size for member in listed],
        },
        schema=ENTRIES,
    )


def _key(name: str) -> str:
    """What an image and the files that speak of it share: the name up to the first dot."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}{base.partition('.')[0]}"


def _said(file: Path, name: str, kind: str, data: bytes) -> dict[str, Any]:
    try:
        text = data.decode()
        if kind == "cls":
            return {"label": text.strip()}
        if kind == "txt":
            return {"txt": text}
        values = json.loads(text)
    except ValueError as error:
        raise SourceError(
            f"{file} holds {name}, which is no {'JSON' if kind == 'json' else 'text'}: {error}"
        ) from error
    return plain(values) if isinstance(values, dict) else {}
