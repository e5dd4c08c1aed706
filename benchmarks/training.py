"""What benchmarks of codecs and of training share: real images, their features, a training step."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch

from benchmarks.codec_bounds import cosines
from eupe import views
from eupe.encoders import Features
from eupe.heads import DistillationModel
from eupe.losses import teacher_loss, total_loss
from eupe.spec import CentreView, EncoderSpec
from eupe.students import FAMILY, build_student
from pipelines.features.sources import Targets
from pipelines.images import index
from pipelines.images.reader import ImageReader
from pipelines.images.walks import base
from pipelines.recipe import family
from pipelines.training import start

HIDDEN = 3072
"""Width inside the adapter heads, EUPE (arXiv:2603.22387), stages 2 and 3."""
FORWARD_BATCH = 16


def pictures(split: str, count: int, resolution: int) -> np.ndarray:
    """Return real images in their centre view, uint8 [count, R, R, 3], spread over a split."""
    source = family.emoji(split).source
    records = index.whole(source).records
    chosen = records.take([place * len(records) // count for place in range(count)])
    reader, policy = ImageReader(base(source)), CentreView(canvas=resolution)
    return np.stack(
        [
            views.make_view(reader.read(sample), policy, sample["sample_id"], 0).canvas
            for sample in chosen.to_pylist()
        ]
    )


def features(network: Callable[[torch.Tensor], Features], pixels: np.ndarray) -> Features:
    """Run a frozen network over uint8 [n, R, R, 3]; summary [n, D] and patches [n, H, W, D]."""
    parts = []
    with torch.no_grad():
        for start_row in range(0, len(pixels), FORWARD_BATCH):
            batch = torch.from_numpy(pixels[start_row : start_row + FORWARD_BATCH])
            parts.append(network(batch.permute(0, 3, 1, 2).contiguous()))
    return Features(*(torch.cat(column).float() for column in zip(*parts, strict=True)))


class TrainingStep:
    """One step of stage 2 in this process, float32: forward, loss, backward, AdamW.

    Args:
        teachers: name -> (summary width, patch width).
        student: what is trained; ViT-T/16 unless said.
        lr: learning rate; the paper's unless said.
    """

    def __init__(
        self,
        teachers: Mapping[str, tuple[int, int]],
        student: EncoderSpec = FAMILY["eupe_vitt16"],
        lr: float | None = None,
    ) -> None:
        stage = family.full("eupe_vitt16").stage("stage2")
        self.model = DistillationModel(build_student(student), teachers, HIDDEN).train()
        self._optimizer = start.optimizer(self.model, stage)
        for group in self._optimizer.param_groups:
            group["lr"] = lr or group["lr"]

    def __call__(self, pixels: torch.Tensor, targets: Mapping[str, Targets]) -> float:
        """Learn from pixels uint8 [B, 3, R, R] and their targets; return the loss."""
        _, predicted = self.model(pixels)
        loss = total_loss(
            teacher_loss(predicted[name], Features(each.summary, each.patches), each.valid)
            for name, each in targets.items()
        )
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


def smooth_features(
    count: int, side: int, width: int, device: str | torch.device = "cpu"
) -> torch.Tensor:
    """Make up features as smooth as pictures' are, their channels related, float32 [n, H, W, D]."""
    generator = torch.Generator(device).manual_seed(0)
    make = partial(torch.randn, generator=generator, device=device)
    i, j = torch.meshgrid(*(torch.arange(float(side), device=device),) * 2, indexing="ij")
    weights = (1 + torch.arange(width, device=device)) ** -0.5
    falling = (1 + torch.hypot(i, j))[..., None] ** -1.0 * weights
    waves = torch.from_numpy(cosines(side)).float().to(device)
    y = make(count, *falling.shape) * falling
    rows = torch.einsum("ia,jb,nijd->nabd", waves, waves, y)
    turned: torch.Tensor = rows @ torch.linalg.qr(make(width, width)).Q
    return turned


def targets_of(tokens: Features, rows: Sequence[int] | slice = slice(None)) -> Targets:
    """Make targets of features, each coordinate standardised over all of them."""
    standard = [(each - each.flatten(0, -2).mean(0)) / spread(each) for each in tokens]
    summary, patches = standard[0][rows], standard[1][rows]
    return Targets(summary, patches, torch.ones(len(summary), dtype=torch.bool))


def spread(tokens: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each coordinate of [..., D], never zero."""
    return tokens.flatten(0, -2).std(0).clamp_min(1e-6)
