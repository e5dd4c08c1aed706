"""Colour profiles: which of them mean other colours than sRGB by the same values.

Pixels are taken as they are, as the published teachers take them; who has wide-gamut pictures is
told so.
"""

import io
from functools import lru_cache

from PIL import Image, ImageCms

TOLERANCE = 4
"""Of 255: by so much a profile may move a colour and count as sRGB; versions of it differ by 2."""
_COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 120, 60), (64, 64, 64), (160, 160, 160)]
_MODES = {"RGB": "RGB", "GRAY": "L"}


def other_than_srgb(profile: bytes | None) -> str | None:
    """Return the name of an ICC profile; None where there is none or it means what sRGB means."""
    return _other(profile) if profile else None


@lru_cache(maxsize=256)
def _other(profile: bytes) -> str | None:
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        name = ImageCms.getProfileDescription(opened).strip() or "unnamed"
        mode = _MODES.get(opened.profile.xcolor_space.strip())
        if mode is None:
            return name
        asked = Image.new("RGB", (len(_COLOURS), 1))
        asked.putdata(_COLOURS)
        asked = asked.convert(mode)
        shown = ImageCms.profileToProfile(
            asked, opened, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
    except (ImageCms.PyCMSError, OSError, ValueError):
        return "damaged"
    assert shown is not None  # it is not asked to work in place
    pairs = zip(asked.convert("RGB").tobytes(), shown.tobytes(), strict=True)
    return name if max(abs(one - other) for one, other in pairs) > TOLERANCE else None
