"""Pixels of pictures as people have them: 12-bit TIFF, transparent values, grey turned round."""

import io
import struct
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from eupe import views

BACKGROUND = (10, 20, 30)
TWELVE_BITS = (0, 1000, 2000, 4095)
SHOWN = (0, 62, 125, 255)
"""The four values of 12 bits in 8, the lower bits left out."""
MAX_SAMPLE_VALUE, PHOTOMETRIC = 281, 262


def row(data: bytes) -> list[tuple[int, ...]]:
    """Return the pixels of a picture's first row."""
    decoded = np.asarray(views.decode(data, BACKGROUND))
    return [tuple(pixel) for pixel in decoded[0].tolist()]


def grey(*values: int) -> list[tuple[int, ...]]:
    return [(value,) * 3 for value in values]


def tiff(values: Sequence[int], tags: dict[int, int] | None = None) -> bytes:
    """A TIFF of one row of 16-bit grey, as Pillow writes it."""
    out = io.BytesIO()
    picture = Image.fromarray(np.array([values], np.uint16))
    picture.save(out, "TIFF", tiffinfo=tags or {})
    return out.getvalue()


def packed_tiff() -> bytes:
    """A TIFF whose four pixels have 12 bits each, two in three bytes."""
    pixels = bytes([0x00, 0x03, 0xE8, 0x7D, 0x0F, 0xFF])
    width, height, bits, compression, photometric = 256, 257, 258, 259, 262
    offset, samples, rows, size = 273, 277, 278, 279
    entries = [(width, 4), (height, 1), (bits, 12), (compression, 1), (photometric, 1)]
    entries += [(offset, 8), (samples, 1), (rows, 1), (size, len(pixels))]
    directory = struct.pack("<H", len(entries))
    directory += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory + bytes(4)


def png(bits: int, colour: int, width: int, pixels: bytes, transparent: bytes) -> bytes:
    """A PNG of one row, of any depth, with the value that is transparent (tRNS)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, 1, bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"tRNS", transparent)
        + chunk(b"IDAT", zlib.compress(b"\0" + pixels))
        + chunk(b"IEND", b"")
    )


def test_twelve_bits_are_not_nearly_black():
    assert row(packed_tiff()) == grey(*SHOWN)
    assert row(tiff(TWELVE_BITS, {MAX_SAMPLE_VALUE: 4095})) == grey(*SHOWN)


def test_twelve_bits_in_sixteen_that_say_nothing_are_refused_not_guessed():
    with pytest.raises(views.ImageError, match=r"none is above 4095.*MaxSampleValue \(281\)"):
        views.decode(tiff(TWELVE_BITS))
    assert row(tiff((0, 1000, 4096, 65535))) == grey(0, 3, 16, 255)
    assert row(tiff((0, 0, 0, 0))) == grey(0, 0, 0, 0)


def test_a_tiff_whose_zero_is_white_is_no_negative():
    assert row(tiff((0, 16000, 32000, 65535), {PHOTOMETRIC: 0})) == grey(255, 193, 130, 0)


@pytest.mark.parametrize(("bits", "step"), [(2, 85), (4, 17), (8, 1)])
def test_a_transparent_grey_is_transparent_at_every_depth(bits, step):
    pixels = {2: bytes([0b00_01_10_11]), 4: bytes([0x01, 0x23]), 8: bytes(range(4))}[bits]
    wanted = [(0,) * 3, BACKGROUND, (2 * step,) * 3, (3 * step,) * 3]
    assert row(png(bits, 0, 4, pixels, struct.pack(">H", 1))) == wanted


def test_a_transparent_grey_of_sixteen_bits_is_that_value_alone():
    values = (0x1234, 0x1235, 0x8000, 0)
    found = row(png(16, 0, 4, struct.pack(">4H", *values), struct.pack(">H", 0x1234)))
    assert found == [BACKGROUND, *grey(0x12, 0x80, 0)]


def test_a_transparent_colour_of_sixteen_bits_is_refused():
    """Of 16-bit colours only the upper halves are decoded: which one was meant cannot be told."""
    pixels = struct.pack(">6H", 0, 0, 0, 255, 255, 255)
    with pytest.raises(views.ImageError, match="16-bit colours one of which is transparent"):
        views.decode(png(16, 2, 2, pixels, struct.pack(">3H", 0, 0, 0)))
    assert row(png(8, 2, 2, bytes([1, 2, 3, 4, 5, 6]), struct.pack(">3H", 1, 2, 3))) == [
        BACKGROUND,
        (4, 5, 6),
    ]
