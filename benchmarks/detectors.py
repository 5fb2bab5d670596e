"""The compared detectors: DINO, DINO with the reference attention, and transformers' two-stage Deformable DETR.

They have the same sizes, and random weights.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, use_backend

DINO, REFERENCE, DEFORMABLE = "DINO", "DINO with reference attention", "Deformable DETR"
DETECTORS = (DINO, REFERENCE, DEFORMABLE)
NUM_LABELS = 91

_RESNET = {"model_type": "resnet", "out_features": ["stage2", "stage3", "stage4"]}
_FOUR_STAGES = ["stage1", "stage2", "stage3", "stage4"]
_TOY = {
    "backbone_config": _RESNET
    | {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 40], "embedding_size": 8, "layer_type": "basic"},
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
MODELS = {
    "r50-4scale": {"backbone_config": _RESNET},
    "r50-5scale": {"backbone_config": _RESNET | {"out_features": _FOUR_STAGES}, "num_feature_levels": 5},
    "swin-t": {"backbone_config": _RESNET | {"model_type": "swin"}},
    "toy": _TOY,
}
# With tf32, weights are float32, and a global setting of torch lets products use TensorFloat-32.
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}
MODES = {
    "eager": None,
    "compiled": {"dynamic": False},
    "dynamic": {"dynamic": True},
    "graphs": {"dynamic": False, "mode": "reduce-overhead"},  # CUDA graphs
}


def num_queries_of(model: str) -> int:
    return 15 if model == "toy" else 900


def our_config(model: str, **changes) -> DinoDetrConfig:
    settings = {"num_queries": num_queries_of(model), "num_labels": NUM_LABELS}
    return DinoDetrConfig(**settings | MODELS[model] | changes)


def their_config(model: str, **changes) -> DeformableDetrConfig:
    """Two-stage Deformable DETR with box refinement and DINO's sizes, with losses of all layers and no dropout, like DINO."""
    num_queries = num_queries_of(model)
    settings = {
        "two_stage": True,
        "with_box_refine": True,
        "num_queries": num_queries,
        "two_stage_num_proposals": num_queries,
        "encoder_ffn_dim": 2048,
        "decoder_ffn_dim": 2048,
        "num_labels": NUM_LABELS,
        "auxiliary_loss": True,
        "dropout": 0.0,
    }
    return DeformableDetrConfig(**settings | MODELS[model] | changes)


def build(detector: str, model: str, device: str = "cpu", dtype: str = "float32", **changes) -> nn.Module:
    """Build a detector in evaluation mode, with random weights from a fixed seed."""
    torch.manual_seed(0)
    if detector == DEFORMABLE:
        built = DeformableDetrForObjectDetection(their_config(model, **changes))
        _freeze_like_dino(built)
    else:
        built = DinoDetrForObjectDetection(our_config(model, **changes))
    return built.eval().to(device, DTYPES[dtype])


def _freeze_like_dino(detector: DeformableDetrForObjectDetection) -> None:
    """Freeze only the stem and the first stage of a ResNet.

    The library intends the same, but looks for names that its ResNet does not have, and so freezes the whole backbone. A step
    without gradients of the backbone could not be compared.
    """
    for name, parameter in detector.model.backbone.named_parameters():
        if "encoder.stages." in name:
            parameter.requires_grad_("encoder.stages.0." not in name)


def compile_model(model: nn.Module, mode: str) -> nn.Module:
    if MODES[mode] is None:
        return model
    torch._dynamo.config.recompile_limit = 64  # all dtypes and modes share this limit; beyond it, torch runs eagerly
    return torch.compile(model, **MODES[mode])


@contextmanager
def computing_in(dtype: str, detector: str) -> Iterator[None]:
    """Within, float32 products use the precision of the dtype, and DINO uses the attention of the detector."""
    matmul, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        with use_backend("reference") if detector == REFERENCE else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn


def detection(
    detector: str, model: nn.Module, pixel_values: Tensor, dtype: str = "float32", mode: str = "eager"
) -> Callable[[], Tensor]:
    """Make a function that runs a detector on a batch without padding.

    Args:
        pixel_values: (B, 3, h, w) of any float dtype.
    Returns:
        a function that gives logits (B, Q, K).
    """
    inputs = {"pixel_values": pixel_values.to(DTYPES[dtype])}
    if detector == DEFORMABLE:  # otherwise it makes one in each call
        inputs["pixel_mask"] = torch.ones(
            pixel_values.shape[0], *pixel_values.shape[2:], dtype=torch.long, device=pixel_values.device
        )
    forward = compile_model(model, mode)

    @torch.no_grad()
    def detect() -> Tensor:
        with computing_in(dtype, detector):
            if mode == "graphs":
                torch.compiler.cudagraph_mark_step_begin()
            return forward(**inputs).logits

    return detect


def random_images(batch_size: int, height: int, width: int, device: str = "cpu") -> Tensor:
    """Random normalised images (B, 3, h, w)."""
    torch.manual_seed(0)
    return torch.randn(batch_size, 3, height, width).to(device)


def random_labels(num_images: int, num_boxes: int, device: str = "cpu") -> list[dict[str, Tensor]]:
    """Random labels, with boxes well inside their images."""
    torch.manual_seed(0)
    return [
        {
            "class_labels": torch.randint(NUM_LABELS, (num_boxes,)).to(device),
            "boxes": torch.cat([0.3 + 0.4 * torch.rand(num_boxes, 2), 0.05 + 0.3 * torch.rand(num_boxes, 2)], dim=1).to(
                device
            ),
        }
        for _ in range(num_images)
    ]
