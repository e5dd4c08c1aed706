"""The constants a plan rests on, each with its source, and how sure a figure is that rests on them.

A figure is `computed` where the recipe and the file format alone decide it, `assumed` where a
constant of this file does, and `measured` where a run on this machine does (`eupe plan --measure`).
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError
from yaml import YAMLError

from eupe.errors import BadInput
from eupe.spec import Spec

How = Literal["measured", "computed", "assumed"]
"""Where a figure comes from."""


class Figure(NamedTuple):
    """A number, its unit, and where it comes from."""

    value: float
    unit: str
    how: How


class Gpu(NamedTuple):
    """An accelerator as its maker describes it.

    Attributes:
        flops: bfloat16 multiply-adds counted twice, dense, a second.
        memory_bytes: of its own.
        node_cores: of a usual node of eight, hyperthreads counted, divided by eight.
        source: of these figures.
    """

    flops: float
    memory_bytes: float
    node_cores: float
    source: str


GPUS: dict[str, Gpu] = {
    "a100": Gpu(312e12, 80e9, 12, "NVIDIA A100 datasheet; p4de.24xlarge has 96 vCPU"),
    "h100": Gpu(989.4e12, 80e9, 24, "NVIDIA H100 SXM datasheet; p5.48xlarge has 192 vCPU"),
    "h200": Gpu(989.4e12, 141e9, 24, "NVIDIA H200 datasheet; p5en.48xlarge has 192 vCPU"),
    "b200": Gpu(2250e12, 180e9, 24, "NVIDIA DGX B200 datasheet (dense); p6-b200 has 192 vCPU"),
    "l40s": Gpu(362e12, 48e9, 24, "NVIDIA L40S datasheet (dense); g6e.48xlarge has 192 vCPU"),
}
"""Accelerators by name."""


class Rates(Spec):
    """What is assumed of machines and prices; a file given by `--prices` changes any of it."""

    extraction_utilisation: float = Field(
        0.3,
        gt=0,
        le=1,
        description="share of the peak in an extraction, decoding apart, bfloat16; measured on one "
        "H100: 0.20 to 0.37 for transformers, 0.31 for the ViT-g (docs/performance.md); a small "
        "CNN reaches 0.03",
    )
    training_utilisation: float = Field(
        0.18,
        gt=0,
        le=1,
        description="share of the peak in a training step; measured on one H100: a compiled "
        "ViT-S/16 at 256 px (docs/performance.md); not compiled 0.09, a ViT-B 0.16",
    )
    decode_views: float = Field(
        25,
        gt=0,
        description="pictures a second that one core decodes, augments on a canvas of 512 and "
        "resizes; ours: 240 cores for 8 GPUs at some 6,000 a second",
    )
    picture_bytes: float = Field(
        115_440,
        gt=0,
        description="bytes of a picture of a set that is not indexed here; ILSVRC 2012: 1,281,167 "
        "training JPEGs in an archive of 147,897,477,120 bytes",
    )
    disk_bytes: float = Field(
        10e9,
        gt=0,
        description="bytes a second that a node reads; ours: eight NVMe disks of 2 to 3 GB/s, "
        "software included, or a network of 100 Gbit/s",
    )
    gpu_hour: float = Field(
        3.0, ge=0, description="dollars an hour of one GPU; ours: between clouds and resellers"
    )
    terabyte_month: float = Field(
        23.0, ge=0, description="dollars a terabyte and month; AWS S3 Standard, list price"
    )
    put_million: float = Field(
        5.0, ge=0, description="dollars a million PUT requests; AWS S3 Standard, list price"
    )
    get_million: float = Field(
        0.4, ge=0, description="dollars a million GET requests; AWS S3 Standard, list price"
    )
    months: float = Field(1.0, ge=0, description="months that a cache is kept; ours")
    escapes: float = Field(
        0.001,
        ge=0,
        le=1,
        description="share of tokens that a rotated codec keeps in float32; ours: under 0.01 in "
        "the worst that was measured (docs/log.md), none in most",
    )


def read(path: Path) -> Rates:
    """Read rates from a YAML file of some of their fields; the rest stay as they are.

    Raises:
        BadInput: no such file, or a field that is not one.
    """
    try:
        said = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        return Rates.model_validate(said)
    except (OSError, YAMLError, OmegaConfBaseException, ValidationError) as error:
        fields = ", ".join(Rates.model_fields)
        first = " ".join(str(error).split())
        raise BadInput(f"--prices {path}: {first}; wants numbers of: {fields}") from error


class Machine(NamedTuple):
    """What a plan runs on.

    Attributes:
        name: of the accelerator.
        gpu: what is known of it.
        number: of them.
    """

    name: str
    gpu: Gpu
    number: int


def machine(text: str) -> Machine:
    """Return the machine that `h100:8` names.

    Raises:
        BadInput: no such accelerator, or no number of them.
    """
    name, _, count = text.partition(":")
    if name not in GPUS or not (count or "1").isdigit() or int(count or 1) < 1:
        raise BadInput(f"--gpus {text!r}: wants NAME:NUMBER with a name of {', '.join(GPUS)}")
    return Machine(name, GPUS[name], int(count or 1))


def described(rates: Rates, on: Machine) -> list[Mapping[str, object]]:
    """Return every constant with its source, as plain data."""
    fields = Rates.model_fields
    own = [
        {"constant": name, "value": value, "source": str(fields[name].description)}
        for name, value in rates.model_dump().items()
    ]
    return [
        {"constant": f"{on.name} peak", "value": on.gpu.flops, "source": on.gpu.source},
        *own,
    ]
