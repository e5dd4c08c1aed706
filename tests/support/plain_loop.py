"""EUPE's training in plain torch, from the paper's equations alone: what the trainer is held to.

Nothing of the trainer, its losses, heads, encoders or schedules is called here; a stage's settings,
its initial weights, pixels and targets are given.
"""

import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.recipe.stage import StageConfig

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Tokens = tuple[Tensor, Tensor]
"""Summary [B, D] and patches [B, H, W, D2]."""


@dataclass(frozen=True)
class Micro:
    """A micro-batch: uint8 pixels [B, 3, R, R], normalised targets by teacher, valid bool [B]."""

    pixels: Tensor
    targets: Mapping[str, Tokens]
    valid: Tensor


def head(state: Mapping[str, Tensor], prefix: str) -> nn.Sequential:
    """Eq. 3: Linear without bias, LayerNorm, GELU, Linear without bias, with given weights."""
    first, last = state[f"{prefix}.0.weight"], state[f"{prefix}.3.weight"]
    layers = nn.Sequential(
        nn.Linear(first.shape[1], first.shape[0], bias=False),
        nn.LayerNorm(first.shape[0]),
        nn.GELU(),
        nn.Linear(last.shape[1], last.shape[0], bias=False),
    )
    own = {key: value for key, value in state.items() if key.startswith(f"{prefix}.")}
    layers.load_state_dict({key.removeprefix(f"{prefix}."): value for key, value in own.items()})
    return layers


def vit(arguments: Mapping[str, object], state: Mapping[str, Tensor]) -> nn.Module:
    """Build the small ViT with given weights."""
    network = timm.create_model(
        "vit_tiny_patch16_dinov3_qkvb", num_classes=0, dynamic_img_size=True, **arguments
    )
    network.load_state_dict(state)
    return network.train()


def encode(network: nn.Module, pixels: Tensor) -> Tokens:
    """Return the class token and the patch tokens on their grid."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (PIXEL_MEAN, PIXEL_STD))
    tokens = network.forward_features((pixels.float() / 255 - mean) / std)
    patches = tokens[:, network.num_prefix_tokens :]
    side = math.isqrt(patches.shape[1])
    return tokens[:, 0], patches.reshape(len(patches), side, side, -1)


def resized(patches: Tensor, side: int) -> Tensor:
    """Resize a grid of tokens to a larger one, bicubic."""
    if patches.shape[1] == side:
        return patches
    maps = patches.movedim(-1, 1)
    return F.interpolate(maps, size=(side, side), mode="bicubic").movedim(1, -1)


def cosine(ours: Tensor, theirs: Tensor) -> Tensor:
    """L_cos of Eq. 4: one minus the cosine of each token."""
    products = (ours * theirs).sum(-1)
    return 1 - products / (ours.square().sum(-1).sqrt() * theirs.square().sum(-1).sqrt())


def smooth_l1(ours: Tensor, theirs: Tensor, beta: float) -> Tensor:
    """Huber's loss over beta, of each coordinate."""
    gap = (ours - theirs).abs()
    return torch.where(gap < beta, gap.square() / (2 * beta), gap - beta / 2)


def terms(stage: StageConfig, name: str, predicted: Tokens, target: Tokens) -> Tensor:
    """Return Eq. 4, the two parts of Eq. 5, and their sum as Eq. 7 weighs it, by row [4, B]."""
    loss = stage.loss
    side = max(predicted[1].shape[1], target[1].shape[1])
    ours, theirs = resized(predicted[1].float(), side), resized(target[1], side)
    summary = cosine(predicted[0].float(), target[0])
    angle = cosine(ours, theirs).mean((1, 2))
    distance = smooth_l1(ours, theirs, loss.smooth_l1_beta).mean((1, 2, 3))
    patch = loss.alpha * angle + loss.beta * distance
    return torch.stack([summary, angle, distance, summary + loss.gamma.get(name, 1.0) * patch])


def rate(stage: StageConfig, step: int) -> float:
    """Linear warm-up, then half a cosine to zero."""
    batch = stage.global_batch
    scaled = {"none": 1, "linear": batch / 256, "sqrt": math.sqrt(batch / 1024)}
    peak = stage.optimizer.lr * scaled[stage.optimizer.lr_scaling]
    if step < stage.warmup_steps:
        return peak * (step + 1) / stage.warmup_steps
    done = (step - stage.warmup_steps) / (stage.steps - stage.warmup_steps)
    return peak * (1 + math.cos(math.pi * done)) / 2


def train(
    stage: StageConfig,
    network: nn.Module,
    heads: Mapping[str, tuple[nn.Module, nn.Module]],
    steps: Iterable[Iterable[Micro]],
) -> list[dict[str, float]]:
    """Train a stage; return every step's figures, named as the trainer names them.

    Args:
        stage: its settings.
        network: the student, trained in place.
        heads: teacher -> head of the summary, head of the patches.
        steps: the micro-batches of each step.
    """
    settings = stage.optimizer
    weights = [*network.parameters()]
    weights += [weight for pair in heads.values() for each in pair for weight in each.parameters()]
    matrices = [weight for weight in weights if weight.ndim in (2, 4)]
    others = [weight for weight in weights if weight.ndim not in (2, 4)]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": others, "weight_decay": 0.0}],
        lr=settings.lr,
        betas=settings.betas,
        weight_decay=settings.weight_decay,
    )
    half = stage.precision == "bfloat16"
    out = []
    for step, given in enumerate(steps):
        micros = list(given)
        count = sum(int(micro.valid.sum()) for micro in micros)
        sums = {name: torch.zeros(4) for name in heads}
        for micro in micros:
            with torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
                summary, patches = encode(network, micro.pixels)
                predicted = {
                    name: (own[0](summary), own[1](patches)) for name, own in heads.items()
                }
            means = {
                name: terms(stage, name, predicted[name], micro.targets[name])[:, micro.valid].sum(
                    1
                )
                / count
                for name in heads
            }
            sum(mean[3] for mean in means.values()).backward()
            sums = {name: sums[name] + mean.detach() for name, mean in means.items()}
        norm = torch.cat([weight.grad.flatten() for weight in weights]).norm()
        if settings.clip_norm is not None and norm > settings.clip_norm:
            for weight in weights:
                weight.grad *= settings.clip_norm / norm
        for group in optimizer.param_groups:
            group["lr"] = rate(stage, step)
        optimizer.step()
        optimizer.zero_grad()
        figures = {"loss/total": float(sum(each[3] for each in sums.values()))}
        names = ("summary", "patch_cosine", "patch_smooth_l1", "total")
        for teacher, values in sums.items():
            figures |= {
                f"loss/{teacher}/{name}": float(value)
                for name, value in zip(names, values, strict=True)
            }
        out.append({**figures, "lr": rate(stage, step), "gradient_norm": float(norm)})
    return out
