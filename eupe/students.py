"""Students: the six published encoders and the proxy, by name, and how a trainable one is built."""

from eupe.encoders import Encoder
from eupe.spec import EncoderSpec
from eupe.weights import load_state_dict

PROXY_WIDTH, PROXY_DEPTH, PROXY_MLP, PROXY_HEADS = 1536, 50, 8960, 16

FAMILY: dict[str, EncoderSpec] = {
    "eupe_vitt16": EncoderSpec(architecture="vit_tiny_patch16_dinov3_qkvb"),
    "eupe_vits16": EncoderSpec(architecture="vit_small_patch16_dinov3_qkvb"),
    "eupe_vitb16": EncoderSpec(architecture="vit_base_patch16_dinov3_qkvb"),
    "eupe_convnext_tiny": EncoderSpec(architecture="convnext_tiny", summary="average_pool"),
    "eupe_convnext_small": EncoderSpec(architecture="convnext_small", summary="average_pool"),
    "eupe_convnext_base": EncoderSpec(architecture="convnext_base", summary="average_pool"),
    "proxy_vitg": EncoderSpec(
        architecture="vit_large_patch16_dinov3_qkvb",
        model_arguments={
            "embed_dim": PROXY_WIDTH,
            "depth": PROXY_DEPTH,
            "num_heads": PROXY_HEADS,
            "mlp_ratio": PROXY_MLP / PROXY_WIDTH,
        },
    ),
}
"""EUPE (arXiv:2603.22387): the released family and the Stage-1 proxy, for RGB at the
ImageNet mean and std. The transformers have rotary positions, LayerScale, a class token and 4
registers, and share timm's DINOv3 code.

Deviation: the paper gives the proxy's shape (that of PE-G: width 1536, depth 50, MLP 8960, 16
heads, 4 registers) and not its patch size; we take 16, as in the students."""


def build_student(encoder: EncoderSpec, weights: str | None = None, seed: int = 0) -> Encoder:
    """Build a trainable encoder.

    Args:
        encoder: its spec.
        weights: URI as in eupe.weights; None starts from timm's initialisation.
        seed: of that initialisation; the global random state is left as it was.

    Returns:
        The encoder in training mode, float32.

    Raises:
        BadInput: weights that are absent, unreadable or of another architecture.
    """
    student = Encoder(encoder, seed=seed)
    if weights is not None:
        student.network.load_state_dict(load_state_dict(weights, encoder))
    return student
