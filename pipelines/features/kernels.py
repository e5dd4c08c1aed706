"""Two kernels of Triton: stored bytes to coefficients, and frequencies to tokens, a pass each.

Torch's wheels for CUDA bring Triton; `pipelines.features.fused` says where it is used. Products of
float32 are split: each side is the sum of two float16, high and low (22 bits of 24), and of their
four products the three that count are added up in float32, the small ones first, because a tensor
core cuts off what its sum cannot hold.

With TRITON_INTERPRET=1 both run on a CPU, slowly: so they are tested where there is no GPU.

Shapes: n rows, F frequencies (or tokens), k values of each, D channels, N tokens.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8
"""That one program of `look_up` does, so that what they share is read once."""
VALUES = 512
"""Of a row that it does, at most."""
FREQUENCIES = 32
"""That a program of `waves` adds up at a time: another number would give other last bits."""


class Tile(NamedTuple):
    """What one program of `waves` holds, and how it runs: the fastest of 19 that were tried.

    Attributes:
        tokens: at most.
        channels: at most.
        warps: that work on it.
        stages: read ahead.
    """

    tokens: int
    channels: int
    warps: int
    stages: int


LARGE, SMALL = Tile(256, 128, 8, 3), Tile(128, 64, 4, 2)
LARGE_BYTES = 200 << 10
"""Of shared memory that a block can have (H100: 227 kB): it takes `LARGE`."""


@cache
def _tile(device: torch.device) -> Tile:
    if device.type != "cuda":
        return SMALL
    about = torch.cuda.get_device_properties(device)
    shared: int = about.shared_memory_per_block_optin  # type: ignore[attr-defined]  # it is there
    return LARGE if shared >= LARGE_BYTES else SMALL


@triton.jit
def _look_up(
    data,
    row_bytes,
    places,
    factors,
    levels,
    scales,
    out,
    num_rows,
    kept,
    place_step,
    byte_step,
    plane_step,
    PLANES: tl.constexpr,
    SPLIT: tl.constexpr,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    frequency = tl.program_id(0)
    first = tl.program_id(1) * ROWS
    each = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = each < kept
    place = frequency * place_step + each
    factor = tl.load(factors + place, mask=inside, other=0.0)
    one = tl.load(places + place, mask=inside, other=0)
    width = one & 15
    if PLANES > 1:
        two = tl.load(places + plane_step + place, mask=inside, other=0)
        width += two & 15
    if PLANES > 2:
        three = tl.load(places + 2 * plane_step + place, mask=inside, other=0)
        width += three & 15
    table = levels + (1 << width) - 1
    for row in range(first, tl.minimum(first + ROWS, num_rows)):
        start = data + tl.cast(row, tl.int64) * row_bytes + frequency * byte_step
        byte = tl.load(start + (one >> 7), mask=inside, other=0).to(tl.int32)
        code = (byte >> ((one >> 4) & 7)) & ((1 << (one & 15)) - 1)
        below = one & 15
        if PLANES > 1:
            byte = tl.load(start + (two >> 7), mask=inside, other=0).to(tl.int32)
            code += ((byte >> ((two >> 4) & 7)) & ((1 << (two & 15)) - 1)) << below
            below += two & 15
        if PLANES > 2:
            byte = tl.load(start + (three >> 7), mask=inside, other=0).to(tl.int32)
            code += ((byte >> ((three >> 4) & 7)) & ((1 << (three & 15)) - 1)) << below
        value = tl.load(table + code, mask=inside, other=0.0) * factor
        if SPLIT:
            high = value.to(tl.float16)
            low = (value - high.to(tl.float32)).to(tl.float16)
            line = out + (tl.cast(frequency, tl.int64) * num_rows + row) * (3 * kept)
            tl.store(line + each, low, mask=inside)
            tl.store(line + kept + each, high, mask=inside)
            tl.store(line + 2 * kept + each, high, mask=inside)
        else:
            of_row = tl.cast(row, tl.int64) * tl.num_programs(0) + frequency
            if SCALED:
                value = value * tl.load(scales + of_row)
            tl.store(out + of_row * kept + each, value, mask=inside)


def look_up(
    data: Tensor,
    places: Tensor,
    factors: Tensor,
    levels: Tensor,
    shape: tuple[int, int],
    byte_step: int = 0,
    scales: Tensor | None = None,
    split: bool = False,
) -> Tensor:
    """Look up the values of rows and multiply them with their factors.

    Args:
        data: uint8 [n, B].
        places: int32 [planes, P], where in a row the fields of a code lie, the lowest plane first:
            byte << 7 | first bit << 4 | bits; 0 where there is none. P is F k, or k of one token
            if all are alike.
        factors: float32 [P].
        levels: float32 [511]; those of codes of w bits begin at 2^w - 1.
        shape: (F, k).
        byte_step: from a token's bytes to the next one's, where all are alike.
        scales: float32 [n, F], multiplied too.
        split: return [F, n, 3 k] float16, (low, high, high) of each; k is even.

    Returns:
        float32 [n, F, k], or as `split` has it.
    """
    count, kept = shape
    num_rows = len(data)
    if split:
        out = torch.empty(count, num_rows, 3 * kept, dtype=torch.float16, device=data.device)
    else:
        out = torch.empty(num_rows, count, kept, device=data.device)
    if not out.numel():
        return out
    block = min(VALUES, triton.next_power_of_2(kept))
    grid = (count, triton.cdiv(num_rows, ROWS), triton.cdiv(kept, block))
    with torch.cuda.device_of(data):
        _look_up[grid](
            data,
            data.stride(0),
            places,
            factors,
            levels,
            out if scales is None else scales,
            out,
            num_rows,
            kept,
            kept if places.shape[1] == count * kept and not byte_step else 0,
            byte_step,
            places.shape[1],
            PLANES=len(places),
            SPLIT=split,
            SCALED=scales is not None,
            ROWS=ROWS,
            BLOCK=block,
            num_warps=4,
        )
    return out


@triton.jit
def _waves(
    turned,
    high,
    low,
    scales,
    peaks,
    column,
    offset,
    out,
    num_tokens,
    num_frequencies,
    dim,
    frequency_step,
    row_step,
    TOKENS: tl.constexpr,
    FREQUENCIES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    row = tl.program_id(2)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    wanted, there = token < num_tokens, channel < dim
    found = tl.zeros((TOKENS, CHANNELS), tl.float32)
    start = turned + tl.cast(row, tl.int64) * row_step
    for first in range(0, num_frequencies, FREQUENCIES):
        frequency = first + tl.arange(0, FREQUENCIES)
        known = frequency < num_frequencies
        scale = tl.load(scales + row * num_frequencies + frequency, mask=known, other=0.0)
        at = tl.cast(frequency, tl.int64)[:, None] * frequency_step + channel[None]
        value = tl.load(start + at, mask=known[:, None] & there[None], other=0.0) * scale[:, None]
        value_high = value.to(tl.float16)
        value_low = (value - value_high.to(tl.float32)).to(tl.float16)
        of_wave = token[:, None] * num_frequencies + frequency[None]
        both = wanted[:, None] & known[None]
        wave_high = tl.load(high + of_wave, mask=both, other=0.0)
        wave_low = tl.load(low + of_wave, mask=both, other=0.0)
        found = tl.dot(wave_low, value_high, found)
        found = tl.dot(wave_high, value_low, found)
        found = tl.dot(wave_high, value_high, found)
    gain = tl.load(column + channel, mask=there, other=0.0) * tl.load(peaks + row)
    constant = tl.load(offset + channel, mask=there, other=0.0)
    found = found * gain[None] + constant[None]
    of_token = (tl.cast(row, tl.int64) * num_tokens + token)[:, None] * dim + channel[None]
    tl.store(out + of_token, found, mask=wanted[:, None] & there[None])


def waves(
    turned: Tensor,
    matrix: tuple[Tensor, Tensor],
    scales: Tensor,
    peaks: Tensor,
    column: Tensor,
    offset: Tensor,
    rows_first: bool,
) -> Tensor:
    """Add up the waves of rows: (matrix @ (scales x turned)) x peak x column + offset.

    Args:
        turned: float32 [F, n, D], or [n, F, D] if rows come first.
        matrix: high and low of the waves, float16 [N, F].
        scales: float32 [n, F]; of what they make of `turned` float16 holds every value.
        peaks: float32 [n].
        column: float32 [D].
        offset: float32 [D].
        rows_first: how `turned` lies.

    Returns:
        tokens float32 [n, N, D].
    """
    high, low = matrix
    num_tokens, num_frequencies = high.shape
    dim, num_rows = turned.shape[-1], len(peaks)
    out = torch.empty(num_rows, num_tokens, dim, device=turned.device)
    if not out.numel():
        return out
    tile = _tile(turned.device)
    tokens = max(16, min(tile.tokens, triton.next_power_of_2(num_tokens)))
    channels = max(16, min(tile.channels, triton.next_power_of_2(dim)))
    frequency_step, row_step = (dim, num_frequencies * dim) if rows_first else (num_rows * dim, dim)
    grid = (triton.cdiv(num_tokens, tokens), triton.cdiv(dim, channels), num_rows)
    with torch.cuda.device_of(turned):
        _waves[grid](
            turned,
            high,
            low,
            scales,
            peaks,
            column,
            offset,
            out,
            num_tokens,
            num_frequencies,
            dim,
            frequency_step,
            row_step,
            TOKENS=tokens,
            FREQUENCIES=FREQUENCIES,
            CHANNELS=channels,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out
