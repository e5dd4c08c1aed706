"""What codecs keep of real features and what they cost: quality, bits and speed, beside bounds.

    python -m benchmarks.codec [--images 200] [--resolution 256] [--teacher NAME ...]
                               [--quick] [--json FILE]

Features are those of held-out emoji: EfficientNet-Lite2's stride-16 map (its ImageNet weights are a
Python package), and a ViT's patch tokens, one that is trained here for a minute or two on Lite2's
features; or those of a recipe's teacher (RECIPE:NAME) or of whatever `eupe encode --model` takes: a
run, an exported student, a network of timm or open_clip, where its weights are to be had. Codecs
are fitted to other images, those of the train split, as a store's are to its sample.

bpfp are bits per feature point, scales and escapes included. cosine, worst and r2 are of tokens as
the teacher gives them; z_cosine and snr_db of standardised ones, as the loss sees them. The bounds
are R2 of Gaussian features at as many bits (benchmarks/codec_bounds.py): real ones are not
Gaussian, and may be kept better than any bound says.

gb_per_s counts float32 features, in memory to memory, all threads; decoding includes the loss
normaliser's z-score, encoding the check of every token's bound. step_share is the time to decode a
batch over that of a ViT-T/16 training step on the same batch, median of interleaved pairs; the
rows named "synthetic" measure it on made-up features of 16 x 16 x 1536, whose quality says nothing.
"""

import platform
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from rich.console import Console

from benchmarks import tables
from benchmarks.codec_bounds import grid_variances, scalar_r2, tokens_r2, water_filled_r2
from benchmarks.pairs import Timed, interleave, median_seconds
from benchmarks.training import TrainingStep, features, pictures, smooth_features, targets_of
from cache.codec.encoded import Codec
from cache.codec.known import OF_PATCHES, default_codec, make_codec
from eupe.encoders import Encoder, Features
from eupe.errors import BadInput
from eupe.moments import Moments
from eupe.normalise import zscore
from eupe.spec import EncoderSpec
from eupe.teachers import load_teacher
from pipelines.caching.measure import SAMPLE_ROWS
from pipelines.caching.quality import quality
from pipelines.features.codec_torch import Decoder, encode
from pipelines.recipe import family, recipes
from pipelines.release import models

CODECS = tuple(name for name in OF_PATCHES if name != "uint8")
BATCH = 16
REPEATS = 15
PAIRS, SECONDS = 9, 60.0
WIDE_SIDE, WIDE_DIM = 16, 1536
COLUMNS = {
    "teacher": "",
    "codec": "",
    "bpfp": ".3f",
    "cosine": ".4f",
    "worst": ".3f",
    "r2": ".4f",
    "z_cosine": ".4f",
    "snr_db": ".2f",
    "tokens_r2": ".4f",
    "grid_r2": ".4f",
    "scalar_r2": ".4f",
    "encode_gb_per_s": ".2f",
    "decode_gb_per_s": ".2f",
    "step_share": ".2%",
}

BRIEF_SIDE, BRIEF_IMAGES, BRIEF_STEPS, BRIEF_LR = 128, 512, 150, 1e-3
BRIEF = EncoderSpec(
    architecture="vit_tiny_patch16_dinov3_qkvb",
    model_arguments={"depth": 4},
)


def lite2(resolution: int) -> Callable[[torch.Tensor], Features]:
    """EfficientNet-Lite2 with ImageNet weights, its stride-16 map as patches."""
    config = family.efficientnet_lite(2, (resolution,))
    return load_teacher(config.name, config.encoder, config.weights)


def vit(console: Console, steps: int) -> Callable[[torch.Tensor], Features]:
    """Train a ViT briefly on Lite2's features."""
    console.print(f"training a ViT for {steps} steps")
    pixels = pictures("train", BRIEF_IMAGES, BRIEF_SIDE)
    tokens = features(lite2(BRIEF_SIDE), pixels)
    dims = {"lite2": (tokens.summary.shape[-1], tokens.patches.shape[-1])}
    step = TrainingStep(dims, BRIEF, BRIEF_LR)
    rng, all_targets = np.random.default_rng(0), targets_of(tokens)
    for number in range(steps):
        rows = torch.from_numpy(rng.choice(len(pixels), BATCH, replace=False))
        batch = torch.from_numpy(pixels[rows.numpy()]).permute(0, 3, 1, 2).contiguous()
        chosen = type(all_targets)(*(each[rows] for each in all_targets))
        loss = step(batch, {"lite2": chosen})
        if number % 25 == 0 or number == steps - 1:
            console.print(f"  step {number}: loss {loss:.3f}")
    network: Encoder = step.model.encoder.eval()
    return network


def teacher_of(named: str) -> Callable[[torch.Tensor], Features]:
    """Load a teacher that is named as RECIPE:NAME, or any model by its name."""
    recipe, _, name = named.partition(":")
    if recipe not in recipes.RECIPES:
        model = models.named(named)
        return load_teacher("model", model.encoder, model.weights)
    teachers = recipes.get(recipe).teachers
    if name not in teachers:
        raise BadInput(f"--teacher {named}: {recipe} has {', '.join(teachers)}")
    config = teachers[name]
    return load_teacher(name, config.encoder, config.weights, config.dtype)


def rows_of(
    name: str, network: Callable[[torch.Tensor], Features], count: int, resolution: int
) -> list[tables.Row]:
    """Measure every codec on one teacher."""
    fitted_on = features(network, pictures("train", count, resolution)).patches
    found = features(network, pictures("test", count, resolution)).patches
    return measured(name, fitted_on, found)


def measured(name: str, fitted_on: torch.Tensor, found: torch.Tensor) -> list[tables.Row]:
    """Measure every codec on features [n, H, W, D], fitted to others."""
    moments = Moments.of(fitted_on.flatten(0, 2).numpy())
    tokens = found.flatten(0, 2).numpy()
    held_out, covariance = Moments.of(tokens), Moments.of(tokens).covariance()
    deviation = (tokens - held_out.mean) / np.maximum(held_out.std(), 1e-9)
    variances = grid_variances(found.numpy(), held_out.mean, covariance)
    rows = []
    for codec_name in CODECS:
        codec = fitted(codec_name, moments, fitted_on)
        kept = quality(codec, found.flatten(1, 2).numpy())
        batch = found[:BATCH].flatten(1, 2).contiguous()
        encoded = encode(codec, batch)
        decode = Decoder(codec, zscore(moments))
        num_bytes, bits = batch.numel() * 4, kept.bits_per_coefficient
        row: tables.Row = {
            "teacher": name,
            "codec": codec_name,
            "bpfp": bits,
            "cosine": kept.cosine,
            "worst": kept.cosine_worst,
            "r2": kept.r2,
            **standardised(codec, found, moments),
            "tokens_r2": tokens_r2(covariance, bits),
            "grid_r2": water_filled_r2(variances, bits),
            "scalar_r2": scalar_r2(variances, bits),
            "encode_gb_per_s": num_bytes
            / median_seconds(partial(encode, codec, batch), REPEATS)
            / 1e9,
            "decode_gb_per_s": num_bytes
            / median_seconds(partial(decode, encoded.data, encoded.escapes), REPEATS)
            / 1e9,
            "tokens": kept.tokens,
            "dim": tokens.shape[1],
            "kurtosis": float((deviation**4).mean()),
        }
        rows.append(row)
    return rows


def fitted(name: str, moments: Moments, rows: torch.Tensor) -> Codec:
    """Fit a codec as a store's is: to moments, and to as many whole pictures [n, H, W, D]."""
    chosen = rows[:: max(1, len(rows) // SAMPLE_ROWS)][:SAMPLE_ROWS].flatten(1, 2).numpy()
    height, width = rows.shape[1:3]
    stored = moments.count, moments.mean, moments.scatter
    return make_codec(default_codec(name), stored, (height, width), chosen)


def standardised(codec: Codec, found: torch.Tensor, moments: Moments) -> dict[str, object]:
    """Compare standardised tokens of features [n, H, W, D] with what a codec gives back."""
    normalise = zscore(moments)
    features = found.flatten(1, 2)
    encoded = encode(codec, features)
    got = Decoder(codec, normalise)(encoded.data, encoded.escapes).double()
    wanted = normalise(features).double()
    error = (got - wanted).square().sum()
    return {
        "z_cosine": float(torch.nn.functional.cosine_similarity(got, wanted, dim=-1).mean()),
        "snr_db": float(10 * torch.log10(wanted.square().sum() / error.clamp_min(1e-300))),
    }


def synthetic(width: int, most_pairs: int) -> list[tables.Row]:
    """Measure what decoding costs beside a training step, 16 x 16 x width.

    A grid codec is there with directions of the channels (basis), and without (rotation).
    """
    mixed = smooth_features(BATCH, WIDE_SIDE, width)
    moments = Moments.of(mixed.flatten(0, 2).numpy())
    few = replace(moments, count=2, scatter=moments.scatter * 2 / moments.count)
    many = replace(moments, count=10**6, scatter=moments.scatter * 10**6 / moments.count)
    step = TrainingStep({"wide": (1, width)})
    pixels = torch.from_numpy(pictures("test", BATCH, WIDE_SIDE * 16))
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    known = {"wide": targets_of(Features(torch.zeros(BATCH, 1), mixed))}
    table = []
    forms = [("rot4", "", moments), ("rot2", "", moments)]
    forms += [
        (name, form, own)
        for name in ("grid0.5", "grid1", "grid2", "grid4")
        for form, own in (("rotation", few), ("basis", many))
    ]
    for name, form, own in forms:
        codec = fitted(name, own, mixed)
        encoded = encode(codec, mixed.flatten(1, 2))
        decode = Decoder(codec, zscore(moments))
        pairs = interleave(
            Timed(lambda _: step(pixels, known)),
            Timed(lambda _, d=decode, e=encoded: d(e.data, e.escapes)),  # type: ignore[misc]
            most_pairs,
            SECONDS,
        )
        share = pairs.speed_ratio()  # step over decode, so its inverse, ends swapped
        table.append(
            {
                "teacher": f"synthetic {form}".strip(),
                "codec": name,
                "bpfp": encoded.bits_per_coefficient(WIDE_SIDE**2, width),
                "decode_gb_per_s": 4 * mixed.numel() / float(np.median(pairs.subject)) / 1e9,
                "step_share": 1 / share.median,
                "step_share_low": 1 / share.high,
                "step_share_high": 1 / share.low,
            }
        )
    return table


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser = tables.parser("codec", __doc__)
    parser.add_argument("--images", type=int, default=200, help="held-out, and as many to fit to")
    parser.add_argument("--resolution", type=int, default=256, help="pixels")
    parser.add_argument(
        "--teacher",
        nargs="+",
        metavar="NAME",
        help="of a recipe, as imagenet1k_vits16:dinov3_l, or a model, as runs/demo; else Lite2 and "
        "a ViT trained here",
    )
    parser.add_argument(
        "--quick", action="store_true", help="of training and decoding next to none"
    )
    arguments = parser.parse_args(argv)
    console = tables.console()
    steps, width, most_pairs = (2, 32, 1) if arguments.quick else (BRIEF_STEPS, WIDE_DIM, PAIRS)
    count, resolution = arguments.images, arguments.resolution
    table = []
    if arguments.teacher:
        try:
            asked = [(named, teacher_of(named)) for named in arguments.teacher]
        except BadInput as error:
            parser.error(str(error))
        for named, network in asked:
            table += rows_of(named, network, count, resolution)
    else:
        table += rows_of("efficientnet_lite2", lite2(resolution), count, resolution)
        table += rows_of("vit_brief", vit(console, steps), count, resolution)
        table += synthetic(width, most_pairs)
    title = f"held-out images, {torch.get_num_threads()} threads, {platform.machine()}"
    tables.show(table, COLUMNS, title, console, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
