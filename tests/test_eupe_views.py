"""Views: pinned digests, pure addresses, every augmentation's effect, and refusal of bad images."""

import base64
import contextlib
import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from eupe import views
from eupe.spec import AugmentedView, CentreView

PATIENCE_SECONDS = 300

GOLDEN = Path(__file__).parent / "golden/views.json"
POLICIES = {
    "centre": CentreView(canvas=64),
    "augmented": AugmentedView(canvas=64, seed=7, solarize_probability=0.5),
    # What crops, flips, blurs and solarizes alone: no change of the colours may move these.
    "uncoloured": AugmentedView(
        canvas=64, seed=7, jitter_probability=0.0, solarize_probability=0.5
    ),
}
NUM_VIEWS = 4
FLOAT_STEP = 1e-12  # relative; float64 keeps 16 digits
ROUNDING = 1  # of 255: one step, since every operation rounds to 8 bits once


def pixels(width: int, height: int, channels: int = 3) -> np.ndarray:
    """A picture with edges, ramps and texture, from integer arithmetic only."""
    y, x, c = np.mgrid[:height, :width, :channels]
    value = 3 * x * (c + 1) + 5 * y + 64 * ((x // 9 + y // 7) % 2) + (x * y * (c + 2)) % 23
    return (value % 256).astype(np.uint8)


def png(array: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", **options)
    return buffer.getvalue()


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pictures(pinned: dict) -> dict[str, bytes]:
    return {
        "wide": png(pixels(150, 90)),
        "tall": png(pixels(40, 130)),
        "transparent": png(pixels(72, 72, 4)),
        "grey16": png((pixels(80, 60, 1)[..., 0].astype(np.uint16) << 8) + 3),
        # Stored as bytes: what is pinned is the decoding, not an encoder.
        "jpeg": base64.b64decode(pinned["jpeg_bytes"]),
    }


def digests(pinned: dict) -> dict[str, list[str]]:
    found = {}
    for picture, data in pictures(pinned).items():
        for name, policy in POLICIES.items():
            count = NUM_VIEWS if policy.kind == "augmented" else 1
            found[f"{picture}/{name}"] = [
                views.make_view(data, policy, f"folder/{picture}", view).digest
                for view in range(count)
            ]
    return found


def test_digests_are_the_pinned_ones():
    """The same libraries draw the same pixels on every machine; others are told apart."""
    pinned = json.loads(GOLDEN.read_text())
    assert digests(pinned) == pinned["digests"]


def test_another_process_draws_the_same_view():
    code = (
        "from eupe import views; from eupe.spec import AugmentedView as A;"
        "print(views.draw(A(seed=3), 'a/b', 2, 640, 480))"
    )
    there = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    assert there.stdout.strip() == str(views.draw(AugmentedView(seed=3), "a/b", 2, 640, 480))


def test_seed_sample_and_view_are_each_part_of_the_address():
    policy = AugmentedView()
    base = views.draw(policy, "a", 1, 100, 100)
    others = [
        views.draw(policy.model_copy(update={"seed": 1}), "a", 1, 100, 100),
        views.draw(policy, "b", 1, 100, 100),
        views.draw(policy, "a", 2, 100, 100),
    ]
    assert all(other != base for other in others)


def test_changing_one_probability_moves_no_other_draw():
    policy = AugmentedView()
    base = views.draw(policy, "a", 0, 300, 200)
    never = views.draw(policy.model_copy(update={"flip_probability": 0.0}), "a", 0, 300, 200)
    assert never.crop == base.crop
    assert (never.hue, never.blur_sigma, never.solarize) == (
        base.hue,
        base.blur_sigma,
        base.solarize,
    )


@given(
    st.text(max_size=8),
    st.integers(0, 10**6),
    st.integers(1, 3000),
    st.integers(1, 3000),
)
def test_every_draw_is_inside_the_picture_and_the_policy(sample_id, view, width, height):
    policy = AugmentedView()
    drawn = views.draw(policy, sample_id, view, width, height)
    left, top, right, bottom = drawn.crop
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert abs(drawn.brightness - 1) <= policy.brightness
    assert abs(drawn.contrast - 1) <= policy.contrast
    assert abs(drawn.saturation - 1) <= policy.saturation
    assert abs(drawn.hue) <= policy.hue
    assert drawn.blur_sigma == 0 or policy.blur_sigma[0] <= drawn.blur_sigma <= policy.blur_sigma[1]


def test_draws_have_the_policy_frequencies():
    """Binomial standard deviations over 4000 draws are under 0.008: four of them."""
    policy = AugmentedView()
    drawn = [views.draw(policy, "x", view, 500, 400) for view in range(4000)]

    def share(test):
        return sum(map(test, drawn)) / len(drawn)

    assert share(lambda p: p.flip) == pytest.approx(policy.flip_probability, abs=0.032)
    assert share(lambda p: p.hue != 0) == pytest.approx(policy.jitter_probability, abs=0.032)
    assert share(lambda p: p.blur_sigma > 0) == pytest.approx(policy.blur_probability, abs=0.032)
    assert share(lambda p: p.solarize) == pytest.approx(policy.solarize_probability, abs=0.032)


def test_crop_areas_are_uniform_when_every_crop_fits():
    policy = AugmentedView(crop_area=(0.1, 0.5))  # at most 0.5 * 4/3 of a square's side squared
    crops = [views.draw(policy, "x", view, 400, 400).crop for view in range(4000)]
    areas = np.sort([(right - left) * (low - top) / 400**2 for left, top, right, low in crops])
    expected = 0.1 + 0.4 * (np.arange(4000) + 0.5) / 4000
    assert np.abs(areas - expected).max() < 0.4 * 1.95 / np.sqrt(4000)  # Kolmogorov, p = 0.001


def test_parameters_are_plain_json():
    drawn = views.draw(AugmentedView(), "a", 0, 64, 64)
    again = json.loads(json.dumps(drawn.to_json_dict()))
    again["crop"] = tuple(again["crop"])
    assert views.ViewParameters(**again) == drawn


def test_centre_view_is_the_centre_square():
    array = pixels(150, 90)
    view = views.make_view(png(array), CentreView(canvas=90), "a", 0)
    assert np.array_equal(view.canvas, array[:, 30:120])


def test_a_share_of_the_centre_is_the_crop_of_256_to_224():
    array = pixels(400, 256)
    view = views.make_view(png(array), CentreView(canvas=224, share=0.875), "a", 0)
    assert view.parameters.crop == (88.0, 16.0, 312.0, 240.0)
    assert np.array_equal(view.canvas, array[16:240, 88:312])


@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.01, 1))
def test_every_share_is_a_square_about_the_centre(width, height, share):
    policy = CentreView(share=share)
    left, top, right, bottom = views.draw(policy, "a", 0, width, height).crop
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert right - left == pytest.approx(share * min(width, height), abs=width * FLOAT_STEP)
    assert (left + right, top + bottom) == pytest.approx((width, height))


@pytest.mark.parametrize("share", [0.0, 1.01])
def test_a_share_beyond_the_picture_is_refused(share):
    with pytest.raises(ValueError, match="share"):
        CentreView(share=share)


@pytest.mark.parametrize(("policy", "view"), [(CentreView(), 1), (AugmentedView(), -1)])
def test_a_view_that_does_not_exist_is_refused(policy, view):
    with pytest.raises(ValueError, match="view"):
        views.draw(policy, "a", view, 64, 64)


def rendered(**parameters) -> tuple[np.ndarray, np.ndarray]:
    array = pixels(64, 64)
    policy = AugmentedView(canvas=64)
    drawn = views.ViewParameters(crop=(0.0, 0.0, 64.0, 64.0), **parameters)
    return array.astype(int), views.render(Image.fromarray(array), policy, drawn).astype(int)


def test_no_augmentation_changes_nothing():
    before, after = rendered()
    assert np.array_equal(before, after)


def test_flip_mirrors():
    before, after = rendered(flip=True)
    assert np.array_equal(before[:, ::-1], after)


def test_brightness_scales():
    before, after = rendered(brightness=0.5)
    assert np.abs(after - before / 2).max() <= ROUNDING


def test_contrast_shrinks_about_the_mean_grey():
    before, after = rendered(contrast=0.5)
    grey = np.asarray(Image.fromarray(before.astype(np.uint8)).convert("L")).mean()
    assert np.abs(after - (grey + before) / 2).max() <= ROUNDING


def test_saturation_zero_is_grey():
    before, after = rendered(saturation=0.0)
    grey = before @ [0.299, 0.587, 0.114]
    assert np.abs(after - grey[..., None]).max() <= ROUNDING


def test_hue_keeps_value_and_saturation_and_a_full_turn_is_none():
    before, after = rendered(hue=0.1)
    for largest in (np.max, np.min):  # HSV's value, and its saturation with it
        kept = np.abs(largest(after, axis=-1) - largest(before, axis=-1))
        assert kept.max() <= ROUNDING
    assert np.abs(after - before).max() > 20
    before, after = rendered(hue=1.0)
    assert np.array_equal(before, after)


def test_blur_is_in_canvas_pixels_and_keeps_the_mean():
    line = np.zeros((65, 65, 3), np.uint8)
    line[:, 32] = 255
    policy = AugmentedView(canvas=65)
    drawn = views.ViewParameters(crop=(0.0, 0.0, 65.0, 65.0), blur_sigma=3.0)
    profile = views.render(Image.fromarray(line), policy, drawn)[32, :, 0].astype(float)
    offsets = np.arange(65) - 32
    sigma = np.sqrt((profile * offsets**2).sum() / profile.sum())
    assert sigma == pytest.approx(3.0, rel=0.1)  # Pillow's Gaussian is three box blurs in 8 bits


def test_solarize_inverts_bright_channels():
    before, after = rendered(solarize=True)
    assert np.array_equal(after, np.where(before < 128, before, 255 - before))


def test_resize_is_antialiased_and_identity_when_equal():
    checks = np.indices((64, 64)).sum(0) % 2 * 255
    canvas = np.repeat(checks[..., None], 3, axis=2).astype(np.uint8)
    small = views.resize(canvas, 16)
    assert small.shape == (16, 16, 3)
    assert np.abs(small[2:-2, 2:-2].astype(int) - 127).max() <= 2  # a sampled one gives 0 or 255
    assert views.resize(canvas, 64) is canvas
    with pytest.raises(ValueError, match="resolution 0"):
        views.resize(canvas, 0)


def test_digest_sees_one_bit():
    canvas = pixels(32, 32)
    changed = canvas.copy()
    changed[31, 31, 2] ^= 1
    assert views.digest(canvas) != views.digest(changed)
    assert len(views.digest(canvas)) == 32


# Decoding.


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = pixels(24, 16)
    turns = {  # what a camera stored, from what it saw
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = png(np.ascontiguousarray(turns[orientation]), exif=exif)
    assert np.array_equal(np.asarray(views.decode(data)), upright)


def test_transparency_lies_over_the_background():
    array = pixels(16, 16, 4)
    array[..., 3] = 0
    array[:8, :, 3] = 255
    flat = np.asarray(views.decode(png(array), background=(10, 20, 30)))
    assert np.array_equal(flat[:8], array[:8, :, :3])
    assert (flat[8:] == (10, 20, 30)).all()


def test_palette_with_transparency():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    decoded = views.decode(saved(image, "PNG", transparency=0), background=(1, 2, 3))
    assert decoded.getpixel((0, 0)) == (1, 2, 3)
    assert decoded.getpixel((3, 3)) == (0, 0, 255)


def test_sixteen_bits_keep_their_scale():
    ramp = (np.arange(256, dtype=np.uint16) << 8).reshape(16, 16)
    decoded = np.asarray(views.decode(png(ramp)))
    assert np.array_equal(decoded[..., 0].ravel(), np.arange(256))


def test_cmyk_and_grey_and_bilevel_become_rgb():
    for mode, kind in (("CMYK", "JPEG"), ("L", "PNG"), ("1", "PNG"), ("LA", "PNG")):
        decoded = views.decode(saved(Image.new(mode, (8, 8)), kind))
        assert decoded.mode == "RGB"


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert views.decode(data).getpixel((0, 0)) == (255, 0, 0)


def broken_png() -> bytes:
    data = bytearray(png(pixels(64, 64)))
    data[len(data) // 2] ^= 0xFF
    return bytes(data)


def huge_png() -> bytes:
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no bytes"),
        (b"plain text", "10 bytes are in no image format"),
        (png(pixels(64, 64))[:900], "cannot be decoded"),
        (saved(Image.fromarray(pixels(64, 64)), "JPEG")[:500], "(?i)truncated"),
        (broken_png(), "cannot be decoded"),
        (huge_png(), "cannot be decoded"),
        (saved(Image.new("F", (4, 4)), "TIFF"), "white point"),
    ],
    ids=["zero", "text", "short-png", "short-jpeg", "broken", "bomb", "float"],
)
def test_what_is_no_image_is_refused_in_one_sentence(data, reason):
    with pytest.raises(views.ImageError, match=reason) as caught:
        views.decode(data)
    assert "\n" not in str(caught.value)


@settings(max_examples=60)
@given(st.integers(0, 10**9), st.binary(max_size=30))
def test_damaged_files_decode_or_raise_image_error(where, patch):
    data = bytearray(png(pixels(20, 20)))
    start = where % len(data)
    data[start : start + len(patch)] = patch
    with contextlib.suppress(views.ImageError):
        views.decode(bytes(data))


def test_a_damaged_avif_is_no_image():
    """What libavif raises is a RuntimeError."""
    sink = io.BytesIO()
    Image.new("RGB", (32, 24), "red").save(sink, "AVIF")
    whole = bytearray(sink.getvalue())
    assert views.decode(bytes(whole)).size == (32, 24)
    damaged = 0
    for place in range(len(whole) // 2, len(whole), 3):
        other = bytearray(whole)
        other[place] ^= 0xFF
        try:
            views.decode(bytes(other))
        except views.ImageError:
            damaged += 1
    assert damaged


if __name__ == "__main__":  # python tests/test_eupe_views.py, after a deliberate change
    try:
        jpeg = json.loads(GOLDEN.read_text())["jpeg_bytes"]
    except FileNotFoundError:
        image = Image.fromarray(pixels(60, 44))
        jpeg = base64.b64encode(saved(image, "JPEG", quality=80)).decode()
    new = {"jpeg_bytes": jpeg}
    GOLDEN.write_text(json.dumps({**new, "digests": digests(new)}, indent=1) + "\n")
