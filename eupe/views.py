"""Views: a sample's bytes to the pixels of one addressed view on its canvas (Pillow and numpy).

A view is a pure function of (policy, sample_id, view number): nothing is consumed from a global
random state, so any process on any machine draws the same view (docs/design.md, laws 2 and 3).
"""

import dataclasses
import hashlib
import io
import math
import struct
import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import (
    Image,
    ImageFilter,
    ImageOps,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from eupe import colours
from eupe.addressed import uniforms
from eupe.fingerprint import canonical_json
from eupe.spec import AugmentedView, CentreView

Canvas = npt.NDArray[np.uint8]
"""Pixels of a square view, uint8 [C, C, 3], RGB."""

CROP_ATTEMPTS = 10
"""Draws of a crop that fits before the whole picture's centre is taken, as the field does."""

_EXIF_ORIENTATION = 0x0112
_MAX_SAMPLE_VALUE = 281  # of TIFF: which value is white
_TWELVE_BITS = 1 << 12
_GREY_STEPS = {"L;2": 85, "L;4": 17}
"""PNG's grey of 2 and 4 bits: what one step is of 255."""
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's decoders raise on damaged files; anything else is a fault of ours and must surface.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Formats of images that are opened, whatever a file's name says; Pillow knows others, of which
one runs Ghostscript on what it is given (EPS)."""
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    EOFError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    RuntimeError,  # libavif's, of a damaged file
)


class ImageError(ValueError):
    """Bytes that are no usable image; the message is one sentence that says why."""


@dataclasses.dataclass(frozen=True)
class ViewParameters:
    """The draws of a view: enough to make it again without the random numbers.

    Attributes:
        crop: (left, top, right, bottom) in pixels of the upright picture, fractions allowed.
        flip: True if mirrored left to right.
        brightness: factor of every channel, 1 for none.
        contrast: factor about the mean grey, 1 for none.
        saturation: factor about each pixel's grey, 1 for none.
        hue: turn of HSV's hue circle as a share of a full turn, 0 for none.
        blur_sigma: standard deviation in canvas pixels, 0 for none.
        solarize: True if channels at or above the policy's threshold are inverted.
    """

    crop: tuple[float, float, float, float]
    flip: bool = False
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    blur_sigma: float = 0.0
    solarize: bool = False

    def to_json_dict(self) -> dict[str, object]:
        """Return the parameters as plain data, the crop as a list."""
        return {**dataclasses.asdict(self), "crop": list(self.crop)}


class View(NamedTuple):
    """A finished view: its canvas, what was drawn, and the digest of the canvas pixels."""

    canvas: Canvas
    parameters: ViewParameters
    digest: str


def opened(data: bytes) -> Image.Image:
    """Read an image's header, decoding no pixel, if it is of FORMATS.

    Raises:
        UnidentifiedImageError, or another of DECODER_ERRORS: it is none.
    """
    return Image.open(io.BytesIO(data), formats=FORMATS)


def decode(data: bytes, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """Decode image bytes to an upright 8-bit RGB picture.

    EXIF orientation is applied; transparency lies over `background`; palette, grey, CMYK, 12-bit
    and 16-bit grey pictures are converted; of an animation the first frame is taken. Values are
    taken as they are: a colour profile is not applied.

    Raises:
        ImageError: no bytes, no image, truncated, too large, or a pixel type without a white point.
    """
    if not data:
        raise ImageError("the image has no bytes")
    try:
        with opened(data) as image:
            _settle_transparent_value(image)
            image.load()
            return _upright(_to_rgb(image, background), _orientation(image))
    except ImageError:
        raise
    except DECODER_ERRORS as error:
        reason = str(error).replace("<_io.BytesIO object at ", "<").strip() or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = f"{len(data)} bytes are in no image format known here"
        raise ImageError(f"the image cannot be decoded: {reason}") from error


def draw(
    policy: CentreView | AugmentedView, sample_id: str, view: int, width: int, height: int
) -> ViewParameters:
    """Draw the parameters of one view; a pure function of its arguments.

    EUPE (arXiv:2603.22387), Stage 2: random resized crop, horizontal flip, colour jitter, Gaussian
    blur, solarization, applied in this order.

    Deviation: within the jitter the order is fixed (brightness, contrast, saturation, hue) where
    the usual code shuffles it, so that a view's parameters are its four factors and no more.

    Args:
        policy: the view policy; its seed is part of the address of an augmented view.
        sample_id: key of the sample.
        view: number of the view, from 0.
        width: of the upright picture, pixels.
        height: of the upright picture, pixels.

    Raises:
        ValueError: a negative view, or a view other than 0 of a centre policy.
    """
    if view < 0:
        raise ValueError(f"view {view} of sample {sample_id!r}: views are numbered from 0")
    if policy.kind == "centre":
        if view != 0:
            raise ValueError(
                f"view {view} of sample {sample_id!r}: a centre policy has only view 0"
            )
        return ViewParameters(_centre_square(policy.share, width, height))
    address = canonical_json([policy.seed, sample_id, view]).decode()
    uniform = uniforms(address, count=2 * CROP_ATTEMPTS + 11)
    # Every number is drawn whether used or not: changing one probability moves no other draw.
    position, rest = uniform[2 * CROP_ATTEMPTS :][:2], uniform[2 * CROP_ATTEMPTS + 2 :]
    flip, jitter, brightness, contrast, saturation, hue, blur, sigma, solarize = rest
    jittered = jitter < policy.jitter_probability
    return ViewParameters(
        crop=_random_crop(policy, uniform[: 2 * CROP_ATTEMPTS], position, width, height),
        flip=flip < policy.flip_probability,
        brightness=1 + policy.brightness * (2 * brightness - 1) if jittered else 1.0,
        contrast=1 + policy.contrast * (2 * contrast - 1) if jittered else 1.0,
        saturation=1 + policy.saturation * (2 * saturation - 1) if jittered else 1.0,
        hue=policy.hue * (2 * hue - 1) if jittered else 0.0,
        blur_sigma=_between(policy.blur_sigma, sigma) if blur < policy.blur_probability else 0.0,
        solarize=solarize < policy.solarize_probability,
    )


def render(
    image: Image.Image, policy: CentreView | AugmentedView, parameters: ViewParameters
) -> Canvas:
    """Make the canvas of a view, uint8 [C, C, 3], from an upright RGB picture.

    Crop and antialiased bicubic resize are one Pillow call on a fractional box.
    """
    side = policy.canvas
    canvas = image.resize((side, side), Image.Resampling.BICUBIC, box=parameters.crop)
    if parameters.flip:
        canvas = canvas.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    jitter = parameters.brightness, parameters.contrast, parameters.saturation, parameters.hue
    if jitter != (1.0, 1.0, 1.0, 0.0):
        canvas = colours.jitter(canvas, *jitter)
    if parameters.blur_sigma > 0:
        canvas = canvas.filter(ImageFilter.GaussianBlur(parameters.blur_sigma))
    if parameters.solarize and policy.kind == "augmented":
        canvas = ImageOps.solarize(canvas, policy.solarize_threshold)
    return np.array(canvas)


def resize(canvas: Canvas, resolution: int) -> Canvas:
    """Resize a canvas uint8 [C, C, 3] to [R, R, 3], antialiased bicubic; itself when R is C."""
    if resolution < 1:
        raise ValueError(f"resolution {resolution}: wants at least 1 pixel")
    if canvas.shape[0] == canvas.shape[1] == resolution:
        return canvas
    picture = Image.fromarray(canvas)
    return np.array(picture.resize((resolution, resolution), Image.Resampling.BICUBIC))


def digest(canvas: Canvas) -> str:
    """Return 32 hexadecimal digits of the sha256 over a canvas's shape and pixels."""
    state = hashlib.sha256(repr(canvas.shape).encode())
    state.update(np.ascontiguousarray(canvas).data)
    return state.hexdigest()[:32]


def make_view(data: bytes, policy: CentreView | AugmentedView, sample_id: str, view: int) -> View:
    """Decode, draw and render one view of a sample.

    Raises:
        ImageError: the bytes are no usable image.
        ValueError: the policy has no such view.
    """
    return view_of(decode(data, policy.background), policy, sample_id, view)


def view_of(
    image: Image.Image, policy: CentreView | AugmentedView, sample_id: str, view: int
) -> View:
    """Draw and render one view of a decoded picture: one decode serves all views of a sample.

    Args:
        image: of `decode`, over the policy's background.
        policy: the view policy.
        sample_id: key of the sample.
        view: number of the view, from 0.

    Raises:
        ValueError: the policy has no such view.
    """
    parameters = draw(policy, sample_id, view, *image.size)
    canvas = render(image, policy, parameters)
    return View(canvas, parameters, digest(canvas))


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I;16"):
        image = _eight_bits(image)
    elif image.mode in ("I", "F"):
        raise ImageError(f"the image has {image.mode}-mode pixels, whose white point is unknown")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        layered = image.convert("RGBA")
        flat = Image.new("RGB", layered.size, background)
        flat.paste(layered, mask=layered.getchannel("A"))
        return flat
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Return a 16-bit grey picture in 8 bits; Pillow's own conversion clips at 255.

    Raises:
        ImageError: a TIFF that does not say what its white is and looks like 12-bit data.
    """
    values = np.asarray(image)
    white_is_zero, num_bits = False, 16
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        white_is_zero = tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
        num_bits = _first(tags.get(TiffImagePlugin.BITSPERSAMPLE), 16)
        highest = _first(tags.get(_MAX_SAMPLE_VALUE), 0)
        if highest:
            num_bits = max(8, highest.bit_length())
        elif num_bits == 16 and 0 < values.max(initial=0) < _TWELVE_BITS:
            raise ImageError(
                f"the image has 16-bit grey pixels of which none is above {values.max()}, as if "
                "they had 12 bits; its tag MaxSampleValue (281) should say which value is white"
            )
    grey = np.minimum(values >> (num_bits - 8), 255).astype(np.uint8)
    if white_is_zero:
        grey = 255 - grey
    key = image.info.get("transparency")
    if key is None:
        return Image.fromarray(grey)
    opaque = np.where(values == key, 0, 255).astype(np.uint8)
    return Image.merge("LA", (Image.fromarray(grey), Image.fromarray(opaque)))


def _settle_transparent_value(image: Image.Image) -> None:
    """Bring the value that a PNG calls transparent to the range of the pixels as they are decoded.

    Raises:
        ImageError: 16-bit colour, of which Pillow keeps the upper halves alone.
    """
    key = image.info.get("transparency")
    if key is None or not isinstance(image, PngImagePlugin.PngImageFile) or not image.tile:
        return
    stored = image.tile[0].args
    if stored in _GREY_STEPS:
        image.info["transparency"] = key * _GREY_STEPS[stored]
    elif stored == "RGB;16B":
        raise ImageError("the image has 16-bit colours one of which is transparent")


def _first(tag: int | tuple[int, ...] | None, absent: int) -> int:
    """Return a tag's value, the first channel's where each has its own."""
    if tag is None or tag == ():
        return absent
    return tag[0] if isinstance(tag, tuple) else tag


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_EXIF_ORIENTATION, 1))
    except DECODER_ERRORS:
        # A damaged EXIF block beside sound pixels states no orientation, as if it were absent.
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    turn = _UPRIGHT.get(orientation)
    return image if turn is None else image.transpose(turn)


def _between(span: tuple[float, float], uniform: float) -> float:
    return span[0] + (span[1] - span[0]) * uniform


def _centre_square(share: float, width: int, height: int) -> tuple[float, float, float, float]:
    side = share * min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _random_crop(
    policy: AugmentedView, attempts: list[float], position: list[float], width: int, height: int
) -> tuple[float, float, float, float]:
    """Return the first drawn box that fits, else the largest centre box of an allowed aspect."""
    log_aspect = (math.log(policy.crop_aspect[0]), math.log(policy.crop_aspect[1]))
    for area_share, aspect_share in zip(attempts[::2], attempts[1::2], strict=True):
        area = _between(policy.crop_area, area_share) * width * height
        aspect = math.exp(_between(log_aspect, aspect_share))
        crop_width, crop_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        if crop_width <= width and crop_height <= height:
            left, top = (width - crop_width) * position[0], (height - crop_height) * position[1]
            break
    else:
        aspect = min(max(width / height, policy.crop_aspect[0]), policy.crop_aspect[1])
        crop_width, crop_height = min(width, height * aspect), min(height, width / aspect)
        left, top = (width - crop_width) / 2, (height - crop_height) / 2
    # Rounding may leave the far edge a hair outside, which Pillow refuses.
    return left, top, min(left + crop_width, float(width)), min(top + crop_height, float(height))
