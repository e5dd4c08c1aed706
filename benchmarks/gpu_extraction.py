"""Extraction on the device, for `benchmarks.gpu`: every teacher of the recipes, random weights.

Of each: its forward pass alone, beside the time that its products would take at the speed of one
large product (the bound); and the whole of what an extractor does with pictures that are drawn
already: copy in, forward, encode, copy out. That is measured one after the other, then beside
each other (`pipelines.features.streams`), and beside each other with what is small played as a
CUDA graph (`eupe.replayed`).
"""

from collections import deque
from concurrent.futures import Future
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.gpu_bench import Bench
from benchmarks.tables import Row
from cache.codec.encoded import Codec
from cache.codec.known import default_codec, make_codec
from eupe.costs import cost
from eupe.encoders import Encoder
from eupe.moments import Moments
from eupe.spec import AugmentedView, Dtype, EncoderSpec, TeacherSpec
from eupe.students import FAMILY
from eupe.teachers import Teacher
from pipelines.caching import indexing, precompute
from pipelines.caching.extractor import UNDER_WAY, Extractor
from pipelines.features.streams import Stored, Streams
from pipelines.machines.in_process import InProcess
from pipelines.machines.pool import IN_FLIGHT
from pipelines.recipe import family, recipes
from pipelines.recipe.config import ExtractionConfig, TeacherConfig
from pipelines.recipe.stores import CacheJob

CODECS = ("float16", "rot4")
BATCHES = 4
"""Done in a row, the last of them to its end, as of a shard."""
WAYS = {
    "in turn": (False, False),
    "beside": (True, False),
    "beside, played": (True, True),
}
"""Name -> (streams of their own, batches of little work as CUDA graphs)."""
COLUMNS = {
    "teacher": "",
    "resolution": "",
    "codec": "",
    "way": "",
    "forward_per_s": ".0f",
    "bound_share": ".1%",
    "whole_per_s": ".0f",
    "idle_share": ".1%",
    "peak_gib": ".1f",
}
BUILD_COLUMNS = {"what": "", "images": "", "images_per_s": ".0f", "gpu_busy_share": ".1%"}


class Subject(NamedTuple):
    """A teacher: its network, input side in pixels, compute dtype, and pictures a forward pass."""

    name: str
    encoder: EncoderSpec
    resolution: int
    dtype: Dtype
    batch: int


def subjects(small: bool) -> list[Subject]:
    """Return the teachers to measure: all real ones, or two of a test's size."""
    if small:
        vit = EncoderSpec(
            architecture="vit_tiny_patch16_dinov3_qkvb",
            model_arguments={"embed_dim": 32, "depth": 1, "num_heads": 2},
        )
        cnn = EncoderSpec(architecture="test_resnet", summary="average_pool")
        return [Subject("vit", vit, 32, "float32", 2), Subject("cnn", cnn, 32, "float32", 2)]
    found = {"proxy_vitg": Subject("proxy_vitg", FAMILY["proxy_vitg"], 256, "bfloat16", 64)}
    for recipe in ("eupe_vits16", "permissive", recipes.DEFAULT):
        for name, teacher in recipes.get(recipe).teachers.items():
            side = max(teacher.resolutions)
            batch = 64 if side < 400 else 32
            found.setdefault(name, Subject(name, teacher.encoder, side, teacher.dtype, batch))
    for name in ("imagenet1k_vits16", "imagenet1k_convnext_tiny"):
        for own, teacher in recipes.get(name).teachers.items():
            side = max(teacher.resolutions)
            found.setdefault(own, Subject(own, teacher.encoder, side, teacher.dtype, 64))
    found["eupe_vitb16"] = Subject("eupe_vitb16", FAMILY["eupe_vitb16"], 256, "bfloat16", 64)
    return list(found.values())


def measure(bench: Bench) -> None:
    """Measure every teacher."""
    for subject in subjects(bench.small):
        bench.do(f"{subject.name} at {subject.resolution}", partial(_measured, bench, subject))


def _measured(bench: Bench, subject: Subject) -> list[Row]:
    """Measure one teacher."""
    name, spec, side, dtype, batch = subject
    with torch.device(
        bench.device
    ):  # initialised there: two billion numbers take the host a minute
        encoder = Encoder(spec)
    teacher = Teacher(
        TeacherSpec(name=name, encoder=spec, weights="0" * 64, dtype=dtype), encoder
    ).to(bench.device)
    host = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), np.uint8)
    there = torch.from_numpy(host).to(bench.device).permute(0, 3, 1, 2).contiguous()
    with bench.peak_memory() as peak:
        forward = bench.seconds(lambda: teacher(there))
    busy = bench.busy(lambda: teacher(there))
    patches = teacher(there).patches
    costs = cost(spec, side)
    bound = 2 * costs.multiply_adds * batch / bench.peak[dtype]
    row: Row = {
        "teacher": name,
        "architecture": spec.architecture,
        "resolution": side,
        "dtype": dtype,
        "batch": batch,
        "parameters": costs.parameters,
        "multiply_adds": costs.multiply_adds,
        "grid": [*patches.shape[1:3]],
        "patch_dim": patches.shape[3],
        "finite": bool(patches.isfinite().all()),
        "forward_per_s": batch / forward,
        "bound_share": bound / forward,
        "peak_gib": peak[0],
        "kernels": busy.kernels,
        "forward_idle_share": busy.idle_share(forward),
    }
    moments = Moments.of(patches[:4].flatten(0, 2).cpu().numpy())
    rows = []
    for codec_name in CODECS:
        codec = make_codec(
            default_codec(codec_name), (moments.count, moments.mean, moments.scatter)
        )

        for way, (beside, replays) in WAYS.items():
            streams, teacher.replays = Streams(bench.device, beside), replays
            whole = partial(_several, teacher, host, codec, streams)
            seconds, busy = bench.seconds(whole), bench.busy(whole, calls=1)
            rows.append(
                {
                    **row,
                    "codec": codec_name,
                    "way": way,
                    "whole_per_s": BATCHES * batch / seconds,
                    "idle_share": busy.idle_share(seconds),
                    "copy_seconds": busy.copy_seconds / BATCHES,
                    "kernel_seconds": busy.seconds / BATCHES,
                }
            )
            if replays and not teacher.replayed:
                rows.pop()  # as without
    return rows


def _several(teacher: Teacher, host: np.ndarray, codec: Codec, streams: Streams) -> None:
    """Do what an extractor does with some batches, pictures uint8 [n, R, R, 3] each."""
    under_way: deque[Future[Stored]] = deque()
    for _ in range(BATCHES):
        features = teacher.features(host, len(host), streams.arrive)
        under_way.append(streams.encode(codec, features))
        if len(under_way) > UNDER_WAY:
            under_way.popleft().result()
    for encoding in under_way:
        encoding.result()


def build(bench: Bench) -> None:
    """Measure a build as it is: real pictures read, decoded, drawn, computed, encoded, written."""
    bench.do("build", partial(_built, bench))


def _built(bench: Bench) -> list[Row]:
    """Build two views of the emoji by a ViT-B/16 of random weights."""
    side, rows = (32, 16) if bench.small else (256, 256)
    encoder, batch = subjects(True)[0].encoder, 8
    if not bench.small:
        encoder, batch = FAMILY["eupe_vitb16"], 64
    dataset = family.emoji("train")
    if bench.small:
        few = {"split": "test", "category": "Activities"}
        source = dataset.source.model_copy(update={"where": few})
        dataset = dataset.model_copy(update={"source": source})
    job = CacheJob(
        dataset=dataset,
        views=AugmentedView(canvas=side),
        num_views=1,
        teachers=(
            TeacherConfig(
                name="vit",
                encoder=encoder,
                weights="random:0",
                dtype="float32" if bench.small else "bfloat16",
                codec="rot4",
                resolutions=(side,),
            ),
        ),
        root=str(bench.folder / "extraction"),
        extraction=ExtractionConfig(
            rows_per_shard=rows, moments_samples=16 if bench.small else 256, compute_batch=batch
        ),
    )
    threads = torch.get_num_threads()
    extractor = Extractor(job.teachers, threads, str(bench.device))
    indexing.index_samples(job)
    pool = InProcess(extractor, IN_FLIGHT)
    stores = precompute.resolve_stores(job, pool)
    precompute.extract_missing(job, stores, pool)  # view 0 warms it up
    more = job.model_copy(update={"num_views": 2})
    with bench.profiled(1) as found:
        done = precompute.extract_missing(more, stores, pool)
    return [
        {
            "what": f"build, {encoder.architecture} at {side} px, {threads} decoding threads",
            "images": done.num_images,
            "invalid": done.num_invalid,
            "images_per_s": done.num_images / done.seconds,
            "gpu_busy_share": found[0].any_seconds / done.seconds,
        }
    ]
