"""Decoding as CUDA does it, by Triton's interpreter, is the oracle; why products are split."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support import interpreted_child
from support.devices import devices
from support.smooth_pictures import grid_codec, pictures, token_error

from cache.codec.grid import PLANES
from cache.codec.quantised import QUANTISATIONS, pack
from pipelines.features import fused
from pipelines.features.codec_torch import Decoder

DISTANCE = 1e-5  # half of what is documented; of a token's root mean square
WIDE = 3e-5  # these tokens are small beside their row's mean, as few teachers' are
PATIENCE_SECONDS = 600


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    root = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(root), str(root / "tests")])
    done = subprocess.run(
        [sys.executable, interpreted_child.__file__],
        check=True,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        env={**os.environ, "PYTHONPATH": paths},
    )
    errors: dict[str, float] = json.loads(done.stdout)
    return errors


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_kernels_of_cuda_are_the_oracle(found):
    assert len(found) == 2 * 2 * 3 + 2 * 2 + 2 * len(QUANTISATIONS)
    far = {what: error for what, error in found.items() if not error < DISTANCE}
    assert far == {}


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    size = np.sqrt(np.square(wanted).mean(-1, keepdims=True))
    return float((np.abs(found - wanted) / size).max())


@devices
@pytest.mark.parametrize("falling", [0.0, 1.0], ids=["flat", "falling"])
def test_a_split_product_keeps_the_digits_that_one_float16_loses(falling, device):
    rng = np.random.default_rng(0)
    weights = np.linalg.qr(rng.standard_normal((768, 768)))[0]
    spread = (1 + np.arange(768)[::-1]) ** -falling  # the widest last, as codecs have them
    values = (rng.standard_normal((200, 768)) * spread).astype(np.float32)
    wanted = values.astype(np.float64) @ weights
    (high, low), (weights_high, weights_low) = fused.split(values), fused.split(weights)
    out = torch.empty(200, 768, device=device)
    sides = (
        torch.cat([low, high, high], 1),
        torch.cat([weights_high, weights_low, weights_high]),
    )
    fused.product(*(side.to(device) for side in sides), out)
    assert relative(out.cpu().numpy(), wanted) < DISTANCE
    fused.product(high.to(device), weights_high.to(device), out)
    assert relative(out.cpu().numpy(), wanted) > 50 * DISTANCE


@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("count", [1, 13, 64])
def test_fields_lie_where_codes_were_packed(width, count):
    codes = np.random.default_rng(width).integers(0, 2**width, (2, count)).astype(np.uint8)
    data = np.concatenate([np.full((2, 5), 255, np.uint8), pack(codes, PLANES[width])], 1)
    found, below = np.zeros((2, count), np.int64), 0
    for place in fused.fields(count, PLANES[width], 5):
        bits = place & 15
        field = data[:, place >> 7] >> (place >> 4 & 7) & ((1 << bits) - 1)
        found += np.where(bits > 0, field, 0).astype(np.int64) << below
        below += int(bits[0])
    np.testing.assert_array_equal(found, codes)


@devices
@pytest.mark.parametrize("name", ["grid1", "grid4"])
@pytest.mark.parametrize("measured", [10_000, 10], ids=["basis", "rotation"])
def test_a_wide_row_is_decoded_within_the_documented_distance(name, measured, device):
    grid, dim = (12, 10), 72
    oracle = grid_codec(name, grid, dim, measured)
    encoded = oracle.encode(pictures(grid, dim, 3, seed=3))
    ours = Decoder(oracle)(encoded.data, encoded.escapes, device).cpu().numpy()
    theirs = oracle.decode(encoded.data, encoded.escapes)
    assert token_error(ours, theirs) < WIDE


def test_without_a_gpu_or_a_compiler_nothing_is_fused(monkeypatch, tmp_path):
    assert not fused.usable(torch.device("cpu"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert not fused.has_compiler()
    (tmp_path / "gcc").touch(0o755)
    assert fused.has_compiler()
