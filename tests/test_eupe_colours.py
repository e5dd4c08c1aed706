"""Colour jitter: torchvision's colours, wherever and by however many threads it is computed."""

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from support.colours_child import PICTURES, jittered
from torchvision.transforms.v2 import functional

from eupe.colours import jitter

PATIENCE_SECONDS = 300

LEVELS = 0.56
"""Of 255: half a level of our one rounding, and 255 * (0.299 - 0.2989) twice, for contrast and for
saturation: red weighs 0.2989 in torchvision's grey values, 0.299 in Pillow's and ours."""
CUT_LEVELS = 2
"""On 8 bits torchvision cuts the fraction off every grey value and every result; we round the
result alone."""
NONE = (1.0, 1.0, 1.0, 0.0)
VECTOR_UNITS = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
PINNED = "c17cd39c1118983794c9cb92f2f590cca2e8422c16a41cef977005c6171c56fb"
"""sha256 of `support.colours_child`'s pictures, the same on every machine."""

factors = st.tuples(*[st.floats(0, 2)] * 3, st.floats(-0.5, 0.5))


def picture(seed: int, height: int = 24, width: int = 33) -> np.ndarray:
    """Colours of every kind, uint8 [H, W, 3]: any, grey, two equal channels, fully saturated."""
    rng = np.random.default_rng(seed)
    array = rng.integers(0, 256, (height, width, 3), np.uint8)
    array[:4, :, 1] = array[:4, :, 2] = array[:4, :, 0]
    array[4:8, :, 1] = array[4:8, :, 2]
    array[8:12] = 255 * (array[8:12] > 127)
    return array


def ours(array: np.ndarray, *factors: float) -> np.ndarray:
    return np.asarray(jitter(Image.fromarray(array), *factors)).astype(float)


def torchvisions(pixels: torch.Tensor, *factors: float) -> torch.Tensor:
    for change, factor in zip(
        (
            functional.adjust_brightness,
            functional.adjust_contrast,
            functional.adjust_saturation,
            functional.adjust_hue,
        ),
        factors,
        strict=True,
    ):
        pixels = change(pixels, factor)
    return pixels


@given(seed=st.integers(0, 2**32 - 1), factors=factors)
@example(seed=0, factors=(1.4, 0.6, 1.2, 0.1))
@example(seed=0, factors=(1.0, 1.0, 1.0, -0.5))
@example(seed=0, factors=(0.0, 2.0, 0.0, 0.5))
def test_jitter_is_torchvisions_on_floats(seed, factors):
    array = picture(seed)
    floats = torch.from_numpy(array).permute(2, 0, 1).float() / 255
    wanted = torchvisions(floats, *factors).permute(1, 2, 0).numpy() * 255
    assert np.abs(ours(array, *factors) - wanted).max() <= LEVELS


@given(seed=st.integers(0, 2**32 - 1), which=st.integers(0, 3), factors=factors)
def test_each_change_is_torchvisions_on_8_bits(seed, which, factors):
    alone = [each if place == which else NONE[place] for place, each in enumerate(factors)]
    array = picture(seed)
    wanted = torchvisions(torch.from_numpy(array).permute(2, 0, 1), *alone).permute(1, 2, 0)
    assert np.abs(ours(array, *alone) - wanted.numpy()).max() <= CUT_LEVELS


@given(st.integers(0, 2**32 - 1))
def test_no_change_changes_nothing(seed):
    array = picture(seed)
    assert np.array_equal(ours(array, *NONE), array)


def test_a_third_of_the_circle_turns_red_to_green_to_blue():
    red = np.zeros((2, 2, 3), np.uint8)
    red[..., 0] = 200
    assert np.array_equal(ours(red, 1.0, 1.0, 1.0, 1 / 3), red[..., [1, 0, 2]])
    assert np.array_equal(ours(red, 1.0, 1.0, 1.0, -1 / 3), red[..., [1, 2, 0]])


@given(seed=st.integers(0, 2**32 - 1), factors=factors, turn=st.sampled_from(["flip", "upside"]))
def test_a_flip_before_is_a_flip_afterwards(seed, factors, turn):
    array = picture(seed)
    turned = {"flip": np.s_[:, ::-1], "upside": np.s_[::-1]}[turn]
    flipped = ours(np.ascontiguousarray(array[turned]), *factors)
    assert np.array_equal(flipped, ours(array, *factors)[turned])


@given(
    seed=st.integers(0, 2**32 - 1),
    factors=factors,
    rows=st.integers(1, 24),
    columns=st.integers(1, 33),
)
def test_a_pixel_depends_on_no_other_but_by_the_mean_grey(seed, factors, rows, columns):
    """Without contrast, of any part of a picture: no vector unit and no order of rows shows."""
    brightness, _, saturation, hue = factors
    array = picture(seed)
    whole = ours(array, brightness, 1.0, saturation, hue)
    part = ours(np.ascontiguousarray(array[:rows, :columns]), brightness, 1.0, saturation, hue)
    assert np.array_equal(part, whole[:rows, :columns])


@pytest.mark.parametrize("threads", [1, 8])
def test_threads_make_no_difference(threads):
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(jittered, [*PICTURES] * 8))
    assert found == [jittered(picture) for picture in PICTURES] * 8
    assert hashlib.sha256(b"".join(found[: len(PICTURES)])).hexdigest() == PINNED


@pytest.mark.parametrize("without", [[], VECTOR_UNITS], ids=["as-here", "no-vector-units"])
def test_another_process_and_another_processor_make_no_difference(without, monkeypatch):
    """Numpy has loops of its own for each kind of vector unit; without them it is as elsewhere."""
    monkeypatch.setenv("NPY_DISABLE_CPU_FEATURES", " ".join(without))
    there = subprocess.run(
        [sys.executable, "-m", "support.colours_child"],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS,
    )
    digest, *units = there.stdout.split()
    assert digest == PINNED
    assert units == [unit for unit in VECTOR_UNITS if unit not in without]
