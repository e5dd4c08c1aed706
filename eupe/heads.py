"""Adapter heads (EUPE, Eq. 3) and the student with its heads: what a stage trains."""

from collections.abc import Mapping

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn

from eupe.encoders import Encoder, Features


class AdapterHead(nn.Sequential):
    """An adapter head: Linear without bias -> LayerNorm -> GELU -> Linear without bias.

    EUPE (arXiv:2603.22387), Eq. 3. Maps the student's tokens [..., in_dim] to a teacher's width
    [..., out_dim]; hidden is 1536 in Stage 1 and 3072 after.
    """

    def __init__(self, in_dim: int, hidden: int, out_dim: int):
        super().__init__(
            nn.Linear(in_dim, hidden, bias=False),
            nn.LayerNorm(hidden),
            nn.GELU(),
            nn.Linear(hidden, out_dim, bias=False),
        )

    def forward(self, tokens: Float[Tensor, "*n in_dim"]) -> Float[Tensor, "*n out_dim"]:
        """Map tokens to a teacher's space."""
        for layer in self:
            tokens = layer(tokens)
        return tokens


class TeacherHeads(nn.Module):
    """The two heads of one teacher, for the summary and for the patches."""

    def __init__(self, encoder: Encoder, hidden: int, summary_dim: int, patch_dim: int):
        super().__init__()
        self.summary = AdapterHead(encoder.summary_dim, hidden, summary_dim)
        self.patches = AdapterHead(encoder.patch_dim, hidden, patch_dim)

    def forward(self, features: Features) -> Features:
        """Predict the teacher's features, on the student's grid."""
        return Features(self.summary(features.summary), self.patches(features.patches))


class DistillationModel(nn.Module):
    """A student encoder with a pair of adapter heads for every teacher (EUPE, Fig. 3).

    Args:
        encoder: the student.
        teachers: name -> (summary width, patch width).
        hidden: width inside the heads.
        seed: of the heads' initial weights; the global random state is left as it was.
    """

    def __init__(
        self,
        encoder: Encoder,
        teachers: Mapping[str, tuple[int, int]],
        hidden: int,
        seed: int = 0,
    ):
        super().__init__()
        self.encoder = encoder
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.heads = nn.ModuleDict(
                {
                    _module_name(name): TeacherHeads(encoder, hidden, *widths)
                    for name, widths in teachers.items()
                }
            )
        self.teachers = tuple(teachers)

    def forward(self, pixels: Real[Tensor, "b 3 r r"]) -> tuple[Features, dict[str, Features]]:
        """Encode pictures and predict every teacher.

        Args:
            pixels: uint8, or float in [0, 255], [B, 3, R, R], RGB.

        Returns:
            The student's features, and teacher -> predicted normalised features: summary [B, D],
            patches [B, H, W, D2] on the student's grid.
        """
        features = self.encoder(pixels)
        return features, {name: self.head(name)(features) for name in self.teachers}

    def head(self, teacher: str) -> TeacherHeads:
        """Return the heads of a teacher."""
        heads = self.heads[_module_name(teacher)]
        assert isinstance(heads, TeacherHeads)
        return heads


def _module_name(teacher: str) -> str:
    """Return a teacher's name with a dash, which none has, for each dot, which torch forbids."""
    return teacher.replace(".", "-")
