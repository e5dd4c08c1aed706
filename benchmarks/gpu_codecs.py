"""Codecs on the device, for `benchmarks.gpu`: speed, and how far they are from the numpy oracle.

Each is measured plain, by torch's operators, and fused (`pipelines.features.fused`), where the
device has that.
"""

from functools import partial
from unittest import mock

import numpy as np
import torch

from benchmarks.gpu_bench import Bench
from benchmarks.tables import Row
from benchmarks.training import smooth_features
from cache.codec.encoded import Encoded
from cache.codec.known import default_codec, make_codec
from eupe.moments import Moments
from eupe.normalise import zscore
from pipelines.features import codec_torch, fused, grid_torch
from pipelines.features.buffers import Buffers
from pipelines.features.codec_torch import Decoder, encode

CODECS = (
    "float16",
    "rot4",
    "grid1",
    "int8",
    "grid2",
    "rot3",
    "rot2",
    "bfloat16",
    "grid4",
    "grid0.5",
    "float32",
)
"""The most useful first: those that there is no time for are left out."""
ORACLE_ROWS = 2
COLUMNS = {
    "codec": "",
    "way": "",
    "decode_gb_per_s": ".1f",
    "decode_bound_share": ".1%",
    "kernel_gb_per_s": ".1f",
    "decode_kernels": ".0f",
    "encode_gb_per_s": ".1f",
    "token_error": ".1e",
    "other_bytes": ".1e",
    "peak_gib": ".2f",
}


def measure(bench: Bench) -> None:
    """Measure every codec on rows of the proxy's shape at 256 pixels; GB are of float32 tokens."""
    rows, side, width = (4, 4, 24) if bench.small else (128, 16, 1536)
    features = smooth_features(rows, side, width, bench.device)
    moments = Moments.of(features[:64].flatten(0, 2).cpu().numpy())
    for name in CODECS:
        bench.do(name, partial(_measured, bench, name, features, moments))


def ways(device: torch.device) -> dict[str, bool]:
    """Return name -> whether decoding is fused, of what a device has."""
    return {"plain": False} | ({"fused": True} if fused.usable(device) else {})


def _measured(bench: Bench, name: str, features: torch.Tensor, moments: Moments) -> list[Row]:
    """Measure one codec on features float32 [n, H, W, D]."""
    rows = []
    for way, wanted in ways(bench.device).items():
        for quantisers in (codec_torch._quantiser, grid_torch._quantiser):
            quantisers.cache_clear()  # they keep the way they were made in
        with mock.patch.object(fused, "usable", return_value=wanted):
            rows.append({"way": way, **_one(bench, name, features, moments)})
    return rows


def _one(bench: Bench, name: str, features: torch.Tensor, moments: Moments) -> Row:
    sample = features[:64].flatten(1, 2).cpu().numpy()
    stored = moments.count, moments.mean, moments.scatter
    grid = features.shape[1], features.shape[2]
    codec = make_codec(default_codec(name), stored, grid, sample)
    patches, num_bytes = features.flatten(1, 2), features.numel() * 4
    encoded = encode(codec, patches)
    # As a loader hands them over: in a buffer that is page-locked where there is a CUDA device.
    data = Buffers().take(encoded.data.shape, encoded.data.dtype)
    data[:] = encoded.data
    decode = partial(Decoder(codec, zscore(moments)), data, encoded.escapes, bench.device)
    with bench.peak_memory() as peak:
        decoding = bench.seconds(decode)
    busy = bench.busy(decode)
    encoding = bench.busy(partial(encode, codec, patches))
    bound = data.nbytes / bench.peak["host to device, pinned"]
    bound += (data.nbytes + num_bytes) / bench.peak["device to device"]
    return {
        "codec": name,
        "shape": [*patches.shape],
        "stored_bytes": data.nbytes,
        "escapes": len(encoded.escapes.row),
        "decode_gb_per_s": num_bytes / decoding / 1e9,
        "decode_bound_share": bound / decoding,
        "decode_kernels": busy.kernels,
        "decode_kernel_seconds": busy.seconds,
        "decode_copy_seconds": busy.copy_seconds,
        "decode_idle_share": busy.idle_share(decoding),
        "kernel_gb_per_s": num_bytes / busy.seconds / 1e9,
        "encode_gb_per_s": num_bytes / bench.seconds(partial(encode, codec, patches)) / 1e9,
        "encode_kernels": encoding.kernels,
        "encode_kernel_seconds": encoding.seconds,
        "peak_gib": peak[0],
        **_beside_the_oracle(codec, sample[:ORACLE_ROWS], encoded, bench.device),
    }


def _beside_the_oracle(
    codec: object, rows: np.ndarray, ours: Encoded, device: torch.device
) -> dict[str, object]:
    """Compare with what `cache.codec` makes of the same rows.

    Returns:
        token_error: largest difference of decoded tokens, in root mean squares of their token.
        other_bytes: share of the encoded bytes that differ.
    """
    theirs = codec.encode(rows)  # type: ignore[attr-defined]
    wanted = codec.decode(theirs.data, theirs.escapes)  # type: ignore[attr-defined]
    got = Decoder(codec)(theirs.data, theirs.escapes, device).cpu().numpy()  # type: ignore[arg-type]
    size = np.sqrt(np.square(wanted, dtype=np.float64).mean(-1, keepdims=True))
    same = ours.data[: len(rows)].view(np.uint8) == theirs.data.view(np.uint8)
    return {
        "token_error": float((np.abs(got - wanted) / size).max()),
        "other_bytes": float(1 - same.mean()),
    }
