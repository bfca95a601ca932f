import hashlib
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from workers.decoding import decode, decode_image
from workers.sources.listing import FileImage


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def shown(data: bytes) -> np.ndarray:
    found = decode(data, pil_to_tensor)
    assert found.facts.error is None
    assert found.pixels is not None
    return found.pixels.numpy()


RED_AND_BLUE = np.zeros((4, 6, 3), np.uint8)
RED_AND_BLUE[:, :3, 0] = RED_AND_BLUE[:, 3:, 2] = 255


def test_facts_describe_the_file() -> None:
    data = encoded(Image.fromarray(RED_AND_BLUE))
    facts = decode(data, pil_to_tensor).facts
    assert facts.sha256 == hashlib.sha256(data).hexdigest()
    assert (facts.bytes, facts.format, facts.width, facts.height, facts.error) == (len(data), "PNG", 6, 4, None)


def test_sixteen_bit_grey_keeps_its_shades() -> None:
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    assert np.array_equal(shown(encoded(Image.fromarray(deep)))[0], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P", "CMYK", "YCbCr"])
def test_every_common_mode_becomes_rgb(mode: str) -> None:
    kind = "TIFF" if mode in {"CMYK", "YCbCr"} else "PNG"
    assert shown(encoded(Image.fromarray(RED_AND_BLUE).convert(mode), kind)).shape == (3, 4, 6)


def test_a_cmyk_jpeg_keeps_its_colours() -> None:
    pixels = shown(encoded(Image.new("RGB", (16, 16), (200, 30, 30)).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(pixels.mean(axis=(1, 2)) - [200, 30, 30]).max() < 12


def test_a_palette_with_transparent_entries_decodes_without_a_warning() -> None:
    image = Image.fromarray(RED_AND_BLUE).convert("P", palette=Image.Palette.ADAPTIVE)
    assert shown(encoded(image, transparency=bytes([0, 128]))).shape == (3, 4, 6)


def test_exif_rotation_is_applied_and_counted_in_the_size() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    found = decode(encoded(Image.fromarray(RED_AND_BLUE), exif=exif), pil_to_tensor)
    assert (found.facts.width, found.facts.height) == (4, 6)
    assert found.pixels is not None
    assert found.pixels[0, 0].min() == 255, "red was left, and clockwise left comes up"


def test_the_first_frame_of_an_animation_counts() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert shown(data)[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"hello", "not an image"),
        (encoded(Image.fromarray(RED_AND_BLUE))[:-30], "OSError|SyntaxError"),
        (encoded(Image.new("RGB", (64, 64)), "JPEG")[:300], "not an image|runcated"),
        (encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF"), "floating-point"),
        (encoded(Image.new("1", (1, 2000))), "longer than 500 times"),
        (encoded(Image.new("RGB", (16, 16)), "ICO"), "not an image"),  # decodes before its size is known
        (encoded(Image.new("RGB", (16, 16)), "EPS"), "not an image"),  # starts a program
        (b"DDS " + struct.pack("<I", 124) + bytes(396), "not an image"),
    ],
)
def test_what_cannot_be_seen_is_told(data: bytes, reason: str) -> None:
    found = decode(data, pil_to_tensor)
    assert found.pixels is None
    assert found.facts.error is not None
    assert any(part in found.facts.error for part in reason.split("|")), found.facts.error
    assert found.facts.bytes == len(data)


def huge_png(side: int) -> bytes:
    """A valid header of a picture that would take gigabytes to decode."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_a_huge_image_is_refused_before_it_is_decoded() -> None:
    found = decode(huge_png(20_000), pil_to_tensor)
    assert found.facts.error == "20000 x 20000 pixels, more than 100 million"
    assert (found.facts.width, found.facts.height) == (20_000, 20_000)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # as workers.decoding does; pytest starts from its own filters
@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_files_never_raise(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]))
    whole = bytearray(encoded(Image.fromarray(RED_AND_BLUE).resize((32, 24)), kind))
    for _ in range(data.draw(st.integers(1, 8))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    found = decode(bytes(whole[: data.draw(st.integers(0, len(whole)))]), pil_to_tensor)
    assert (found.pixels is None) == (found.facts.error is not None)


def test_pipes_and_missing_files_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert decode_image(FileImage(os.fsencode(tmp_path / "pipe")), pil_to_tensor).facts.error == "not a regular file"
    error = decode_image(FileImage(os.fsencode(tmp_path / "gone")), pil_to_tensor).facts.error
    assert error == "cannot be read: No such file or directory"


def test_equal_files_give_equal_input() -> None:
    data = encoded(Image.fromarray(RED_AND_BLUE))
    one, two = decode(data, pil_to_tensor), decode(data, pil_to_tensor)
    assert torch.equal(torch.as_tensor(one.pixels), torch.as_tensor(two.pixels))
