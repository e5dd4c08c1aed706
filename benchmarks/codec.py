"""What codecs keep of real features and what they cost: quality, bits and speed, beside a bound.

    python -m benchmarks.codec [--images 200] [--resolution 256] [--json FILE]

Features are those of held-out emoji: EfficientNet-Lite2's stride-16 map (its ImageNet weights are a
Python package), and a ViT's patch tokens: the newest student of runs/demo, or where there is none,
one that is trained here for a minute or two on Lite2's features. Codecs are fitted to other images,
those of the train split, as a store's are to its sample.

bound_r2 holds for codes that treat tokens as independent draws of one Gaussian with the measured
covariance: the best R2 of any of them at as many bits, by rate-distortion theory's reverse
water-filling (Cover & Thomas, 10.3.3). It is no bound on all codes: neighbours on the grid are
alike, and a code that uses this may exceed it. Real features are not Gaussian either.

gb_per_s counts float32 features, in memory to memory, all threads; decoding includes the loss
normaliser's z-score, encoding the check of every token's bound. step_share is the time to decode a
batch over that of a ViT-T/16 training step on the same batch, median of interleaved pairs.
"""

import platform
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from rich.console import Console

from benchmarks import tables
from benchmarks.pairs import Timed, interleave
from benchmarks.training import TrainingStep, features, pictures, targets_of
from cache.codec.known import default_codec, make_codec
from eupe.encoders import Encoder, Features
from eupe.moments import Moments
from eupe.normalise import zscore
from eupe.spec import EncoderSpec
from eupe.teachers import load_teacher
from pipelines.caching.quality import quality
from pipelines.features.codec_torch import Decoder, encode
from pipelines.recipe import family, recipes
from pipelines.records import checkpoint

CODECS = ("float32", "float16", "bfloat16", "int8", "rot4", "rot3", "rot2")
BATCH = 16
REPEATS = 15
STEP_CODEC = "rot4"  # whose decoding is set against a training step
PAIRS, SECONDS = 9, 120.0
COLUMNS = {
    "teacher": "",
    "codec": "",
    "bits_per_coefficient": ".3f",
    "cosine": ".5f",
    "cosine_worst": ".4f",
    "r2": ".5f",
    "bound_r2": ".5f",
    "encode_gb_per_s": ".2f",
    "decode_gb_per_s": ".2f",
    "step_share": ".2%",
}

BRIEF_SIDE, BRIEF_IMAGES, BRIEF_STEPS, BRIEF_LR = 128, 512, 150, 1e-3
BRIEF = EncoderSpec(
    architecture="vit_tiny_patch16_dinov3_qkvb",
    model_arguments={"depth": 4},
)


def bound_r2(covariance: np.ndarray, bits: float) -> float:
    """Return the largest R2 of independent Gaussian tokens at a rate, by reverse water-filling.

    A code that uses what tokens of one grid have in common may exceed it.

    Args:
        covariance: of the tokens, [D, D].
        bits: per coefficient.
    """
    variances = np.linalg.eigvalsh(covariance).clip(min=0)
    low, high = 0.0, float(variances.max())
    for _ in range(200):
        water = (low + high) / 2
        rate = 0.5 * np.log2(np.maximum(variances / water, 1)).mean() if water > 0 else np.inf
        low, high = (low, water) if rate < bits else (water, high)
    return 1 - float(np.minimum(variances, high).sum() / variances.sum())


def lite2(resolution: int) -> Callable[[torch.Tensor], Features]:
    """EfficientNet-Lite2 with ImageNet weights, its stride-16 map as patches."""
    config = family.efficientnet_lite(2, (resolution,))
    return load_teacher(config.name, config.encoder, config.weights)


def vit(console: Console) -> tuple[str, Callable[[torch.Tensor], Features]]:
    """Return the demo's student if it is there, else train one briefly."""
    recipe = recipes.get("demo")
    for stage in ("stage3", "stage2"):
        saved = checkpoint.latest(recipe.stage_directory(stage))
        if saved is not None:
            encoder = recipe.student.encoder
            return f"vit_demo_{stage}", load_teacher(
                "vit", encoder, f"checkpoint:{saved.directory}"
            )
    console.print(f"no student in {recipe.run_directory}: training one for {BRIEF_STEPS} steps")
    pixels = pictures("train", BRIEF_IMAGES, BRIEF_SIDE)
    tokens = features(lite2(BRIEF_SIDE), pixels)
    dims = {"lite2": (tokens.summary.shape[-1], tokens.patches.shape[-1])}
    step = TrainingStep(dims, BRIEF, BRIEF_LR)
    rng, all_targets = np.random.default_rng(0), targets_of(tokens)
    for number in range(BRIEF_STEPS):
        rows = torch.from_numpy(rng.choice(len(pixels), BATCH, replace=False))
        batch = torch.from_numpy(pixels[rows.numpy()]).permute(0, 3, 1, 2).contiguous()
        chosen = type(all_targets)(*(each[rows] for each in all_targets))
        loss = step(batch, {"lite2": chosen})
        if number % 25 == 0 or number == BRIEF_STEPS - 1:
            console.print(f"  step {number}: loss {loss:.3f}")
    encoder: Encoder = step.model.encoder.eval()
    return "vit_brief", encoder


def rows_of(
    name: str, network: Callable[[torch.Tensor], Features], count: int, resolution: int
) -> list[tables.Row]:
    """Measure every codec on one teacher."""
    fitted_on = features(network, pictures("train", count, resolution)).patches
    found = features(network, pictures("test", count, resolution)).patches
    moments = Moments.of(fitted_on.flatten(0, 2).numpy())
    tokens = found.flatten(0, 2).numpy()
    held_out = Moments.of(tokens)
    deviation = (tokens - held_out.mean) / np.maximum(held_out.std(), 1e-9)
    kurtosis = float((deviation**4).mean())
    step = TrainingStep({name: (1, tokens.shape[1])}) if name.startswith("eff") else None
    rows = []
    for codec_name in CODECS:
        codec = make_codec(
            default_codec(codec_name), (moments.count, moments.mean, moments.scatter)
        )
        kept = quality(codec, tokens[None])
        batch = found[:BATCH].flatten(1, 2).contiguous()
        encoded = encode(codec, batch)
        decode = Decoder(codec, zscore(moments))
        num_bytes = batch.numel() * 4
        row: tables.Row = {
            "teacher": name,
            "codec": codec_name,
            "bits_per_coefficient": kept.bits_per_coefficient,
            "cosine": kept.cosine,
            "cosine_worst": kept.cosine_worst,
            "r2": kept.r2,
            "bound_r2": bound_r2(held_out.covariance(), kept.bits_per_coefficient),
            "encode_gb_per_s": num_bytes / seconds(lambda c=codec, b=batch: encode(c, b)) / 1e9,
            "decode_gb_per_s": num_bytes
            / seconds(lambda d=decode, e=encoded: d(e.data, e.escapes))
            / 1e9,
            "tokens": kept.tokens,
            "dim": tokens.shape[1],
            "kurtosis": kurtosis,
        }
        if step is not None and codec_name == STEP_CODEC:
            pixels = torch.from_numpy(pictures("test", BATCH, resolution))
            pixels = pixels.permute(0, 3, 1, 2).contiguous()
            summary = torch.zeros(BATCH, 1)
            known = targets_of(Features(summary, found[:BATCH]))
            pairs = interleave(
                Timed(lambda _, s=step, p=pixels, k=known: s(p, {name: k})),
                Timed(lambda _, d=decode, e=encoded: d(e.data, e.escapes)),
                PAIRS,
                SECONDS,
            )
            share = pairs.speed_ratio()  # step over decode, so its inverse, ends swapped
            row |= {
                "step_share": 1 / share.median,
                "step_share_low": 1 / share.high,
                "step_share_high": 1 / share.low,
            }
        rows.append(row)
    return rows


def seconds(call: Callable[[], object]) -> float:
    """Return the median time of a call."""
    call()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def main(argv: list[str] | None = None) -> int:
    """Measure and print; see the head of this file."""
    parser = tables.parser("codec", __doc__)
    parser.add_argument("--images", type=int, default=200, help="held-out, and as many to fit to")
    parser.add_argument("--resolution", type=int, default=256, help="pixels")
    arguments = parser.parse_args(argv)
    console = tables.console()
    table = rows_of(
        "efficientnet_lite2",
        lite2(arguments.resolution),
        arguments.images,
        arguments.resolution,
    )
    name, network = vit(console)
    table += rows_of(name, network, arguments.images, arguments.resolution)
    title = f"held-out images, {torch.get_num_threads()} threads, {platform.machine()}"
    tables.show(table, COLUMNS, title, console, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
