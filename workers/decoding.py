"""From a file's bytes to the model's input: what a person would see, or the reason why nothing can be seen."""

import errno
import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from schemas.errors import SourceError
from workers.sources.listing import MAX_FILE_BYTES, Place, UnreadableError

MAX_PIXELS: Final = 100_000_000
MAX_ASPECT: Final = 500

# Part of a store's description: whoever changes what a picture looks like to the model changes this sentence too.
DECODING: Final = "first frame, rotated as EXIF says, 16 bits scaled to 8, transparency dropped, RGB"

# Pillow's own limit warns in one thread for all, once. The one below is checked for every image before it is decoded.
Image.MAX_IMAGE_PIXELS = None

# Pillow warns of damage that it survives. Here an image is stored or its failure is recorded, nothing between.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

# The formats that images are kept in. Others decode before their size is known, or start programs.
_FORMATS: Final = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")

# A file that is damaged says so again tomorrow. These say that this machine is short of something now.
_SHORTAGES: Final = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

# What Pillow's decoders are known to raise on files that are cut short, damaged or made to harm.
_DAMAGE: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    AssertionError,
    RuntimeError,
    struct.error,
    zlib.error,
)

Preprocess = Callable[[Image.Image], Tensor]


@dataclass(frozen=True)
class FileFacts:
    """What can be said of an image's file, even where it shows nothing."""

    sha256: str | None = None
    bytes: int | None = None
    format: str | None = None
    width: int | None = None
    height: int | None = None
    error: str | None = None


@dataclass(frozen=True)
class Decoded:
    """One file: its facts and, if it is an image, the model's input."""

    facts: FileFacts
    pixels: Tensor | None  # (3, height, width)


class UnusableImageError(ValueError):
    """An image that opens, but that is not worth or not safe to decode."""


def decode_image(place: Place, preprocess: Preprocess) -> Decoded:
    """Reads and preprocesses one image; what is wrong with it is told in ``facts.error``.

    Raises:
        SourceError: this machine lacks the memory or the file handles to read it.
    """
    try:
        return decode(place.read(), preprocess)
    except MemoryError as error:
        raise SourceError(f"not enough memory for {place.source}: ingest with fewer things beside it") from error
    except UnreadableError as error:
        return Decoded(FileFacts(error=str(error)), None)
    except OSError as error:
        if error.errno in _SHORTAGES:
            raise SourceError(f"cannot read {place.source} now: {error.strerror}") from error
        return Decoded(FileFacts(error=f"cannot be read: {error.strerror or error}"), None)


def decode(data: bytes, preprocess: Preprocess) -> Decoded:
    """Preprocesses one image from the bytes of its file."""
    facts = FileFacts(hashlib.sha256(data).hexdigest(), len(data))
    if not data:
        return Decoded(replace(facts, error="empty file"), None)
    if len(data) > MAX_FILE_BYTES:
        return Decoded(replace(facts, error=f"larger than {MAX_FILE_BYTES} bytes"), None)
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            facts = replace(facts, format=image.format, width=image.width, height=image.height)
            _check_size(image)
            upright = _upright(image)
            facts = replace(facts, width=upright.width, height=upright.height)
            return Decoded(facts, preprocess(upright))
    except _DAMAGE as error:
        return Decoded(replace(facts, error=_reason(error)), None)


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise UnusableImageError(f"{width} x {height} pixels, more than {MAX_PIXELS // 10**6} million")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnusableImageError(f"{width} x {height} pixels, longer than {MAX_ASPECT} times its width")


def _upright(image: Image.Image) -> Image.Image:
    """The first frame, rotated as its EXIF says, as RGB; transparency is dropped, as CLIP's own pipeline does."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise UnusableImageError("floating-point pixels, whose black and white are not known")
    if image.mode.startswith("I"):
        # Pillow would clip 16-bit values at 255, which turns most pictures white.
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 0xFFFF:
            raise UnusableImageError("32-bit pixels, whose black and white are not known")
        return Image.fromarray((deep >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA").convert("RGB")  # at once, Pillow would warn
    return image if image.mode == "RGB" else image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return (
        f"{type(error).__name__}: {error}".splitlines()[0][:300]
        if not isinstance(error, UnusableImageError)
        else str(error)
    )


def as_shown(path: Path) -> Image.Image:
    """The image at ``path`` as it is given to the model's preprocessing."""
    with Image.open(path) as image:
        return _upright(image).copy()
