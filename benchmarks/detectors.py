"""The detectors that are compared: DINO, the same with the reference attention, and transformers' two-stage Deformable DETR, of the
same sizes and with random weights."""

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
# float32 with products in TensorFloat-32 is a setting of the machine, not of the weights.
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
    """Two-stage, with refined boxes, and the widths of DINO; losses of all layers, no dropout: as DINO trains."""
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
    """A detector in evaluation mode, its weights drawn from a seed."""
    torch.manual_seed(0)
    if detector == DEFORMABLE:
        built = DeformableDetrForObjectDetection(their_config(model, **changes))
        _train_as_we_do(built)
    else:
        built = DinoDetrForObjectDetection(our_config(model, **changes))
    return built.eval().to(device, DTYPES[dtype])


def _train_as_we_do(detector: DeformableDetrForObjectDetection) -> None:
    """Stem and first stage of a ResNet frozen, the others not. The library means that too, but looks for names that its ResNet does
    not have, and freezes all of it: a step that skips the backbone's gradients would be another one."""
    for name, parameter in detector.model.backbone.named_parameters():
        if "encoder.stages." in name:
            parameter.requires_grad_("encoder.stages.0." not in name)


def compile_model(model: nn.Module, mode: str) -> nn.Module:
    if MODES[mode] is None:
        return model
    torch._dynamo.config.recompile_limit = 64  # dtypes and modes compile the same code; beyond the limit it stays eager
    return torch.compile(model, **MODES[mode])


@contextmanager
def computing_in(dtype: str, detector: str) -> Iterator[None]:
    """Products of float32 as "float32" or "tf32" says, and the attention that the detector has."""
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
    """What detects in a batch that is not padded.

    Args:
        pixel_values: (B, 3, h, w) of any float dtype.
    Returns:
        a function that gives logits (B, Q, K).
    """
    inputs = {"pixel_values": pixel_values.to(DTYPES[dtype])}
    if detector == DEFORMABLE:  # it would make one of ones
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
    """(B, 3, h, w) as if normalised."""
    torch.manual_seed(0)
    return torch.randn(batch_size, 3, height, width).to(device)


def random_labels(num_images: int, num_boxes: int, device: str = "cpu") -> list[dict[str, Tensor]]:
    """Boxes well inside their images."""
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
