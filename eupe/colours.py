"""Colour jitter: brightness, contrast, saturation and hue of a picture, as torchvision has them.

All four work on one picture of float32 planes, each operation clips to [0, 255] as the field's do,
and the result is rounded once. Every numpy call is element by element, one IEEE operation an
element, and the one mean is a sum of integers: the same pixels on every machine, whatever its
vector units and number of threads. Each call lets the interpreter go while it works.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

Planes = npt.NDArray[np.float32]

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in a grey value: ITU-R 601, as in Pillow and torchvision."""

_WHITE = 255.0
_FRACTION = 1 << 16  # parts of a level that the mean is summed in


def jitter(
    image: Image.Image, brightness: float, contrast: float, saturation: float, hue: float
) -> Image.Image:
    """Change a picture's colours: brightness first, then contrast, saturation and hue.

    Args:
        image: RGB, 8 bits.
        brightness: factor of every channel, from 0; 1 changes nothing.
        contrast: factor about the mean grey value, from 0; 1 changes nothing.
        saturation: factor about each pixel's grey value, from 0; 1 changes nothing.
        hue: turn of the hue circle of HSV as a share of a full turn, from red towards green.
    """
    memory = np.empty((9, image.height, image.width), np.float32)  # one piece: its pages are new
    planes, scratch = memory[:3], memory[3:]
    planes[:] = np.asarray(image).transpose(2, 0, 1)  # `split` would keep the interpreter
    _scale(planes, brightness, contrast, _mean_grey(image, brightness))
    _saturate(planes, saturation, scratch)
    _turn(planes, hue, scratch)
    planes += np.float32(0.5)  # what follows cuts off
    return Image.merge("RGB", [Image.fromarray(plane.astype(np.uint8)) for plane in planes])


def _mean_grey(image: Image.Image, brightness: float) -> float:
    """Return the mean grey value of a picture once it is brighter, before contrast."""
    levels = np.minimum(brightness * np.arange(256.0), _WHITE)
    parts = np.rint(levels * _FRACTION).astype(np.int64)
    sums: Sequence[int] = (np.reshape(image.histogram(), (3, 256)) * parts).sum(axis=1).tolist()
    red, green, blue = (weight * each for weight, each in zip(LUMA, sums, strict=True))
    return (red + green + blue) / (_FRACTION * image.width * image.height)


def _scale(planes: Planes, brightness: float, contrast: float, grey: float) -> None:
    """Apply brightness and contrast to [3, H, W] in place.

    Both clip, yet one clip does: what brightness clips is white, and contrast maps white to `top`.
    """
    offset = (1 - contrast) * grey
    top = min(contrast * _WHITE + offset, _WHITE)
    planes *= np.float32(brightness * contrast)
    planes += np.float32(offset)
    np.clip(planes, np.float32(0), np.float32(top), out=planes)


def _saturate(planes: Planes, factor: float, scratch: Planes) -> None:
    """Move [3, H, W] from each pixel's grey value, in place."""
    grey, part = scratch[:2]
    np.multiply(planes[0], np.float32(LUMA[0]), out=grey)
    for plane, weight in zip(planes[1:], LUMA[1:], strict=True):
        grey += np.multiply(plane, np.float32(weight), out=part)
    grey *= np.float32(1 - factor)
    planes *= np.float32(factor)
    planes += grey
    np.clip(planes, np.float32(0), np.float32(_WHITE), out=planes)


def _turn(planes: Planes, hue: float, scratch: Planes) -> None:
    """Turn the hue of [3, H, W] in place; HSV's value and saturation stay as they are.

    With V the largest channel, m the smallest and C = V - m, hue in sixths of the circle from red
    times C is linear between the primaries, so nothing is divided:

        |h| C = C - m - red + green + blue      in [0, 3 C], negative where blue is over green

    A channel whose own hue lies D / C sixths away is m + clip(|D - 3 C| - C, 0, C), for D <= 7 C.
    """
    turn = math.remainder(hue, 1)  # in [-1/2, 1/2]
    red, green, blue = planes
    if turn < 0:  # a turn the other way is this one in a mirror, so that D <= 7 C below
        green, blue, turn = blue, green, -turn
    value, low, chroma, angle, double, triple = scratch
    np.maximum(np.maximum(red, green, out=value), blue, out=value)
    np.minimum(np.minimum(red, green, out=low), blue, out=low)
    np.subtract(value, low, out=chroma)
    np.add(green, blue, out=angle)
    angle -= red
    angle += chroma
    angle -= low
    np.copysign(angle, np.subtract(green, blue, out=double), out=angle)
    angle += np.multiply(chroma, np.float32(6 * turn), out=double)
    np.add(chroma, chroma, out=double)
    np.add(double, chroma, out=triple)
    floor = np.subtract(low, chroma, out=chroma)
    for channel in (red, green, blue):
        np.abs(angle, out=channel)
        channel -= triple
        np.abs(channel, out=channel)
        channel += floor
        np.maximum(channel, low, out=channel)
        np.minimum(channel, value, out=channel)
        angle -= double  # the next primary is two sixths on
