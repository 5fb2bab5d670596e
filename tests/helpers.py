"""A detector of toy size, and a batch for it: never square, two images, one of them padded and without boxes."""

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from dino_hf import DinoDetrConfig
from dino_hf.model.feature_levels import FeatureLevels, describe_levels
from dino_hf.runtime.kernel_loading import kernel_builder
from dino_hf.training import CocoEvaluator, DetectionCollator, DetectionTransform, make_optimizer

HAS_COMPILER = kernel_builder().find_compiler() is not None
needs_compiler = pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler to build the CPU kernel")

RESNET = {
    "model_type": "resnet",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 24, 32, 40],
    "embedding_size": 8,
    "layer_type": "basic",
}
SWIN = {"model_type": "swin", "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 2, 4], "window_size": 3}
CONVNEXT = {"model_type": "convnext", "depths": [1, 1, 1, 1], "hidden_sizes": [16, 24, 32, 40]}
BIT = {
    "model_type": "bit",
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 24, 32, 40],
    "embedding_size": 16,
    "num_groups": 4,
}
TIMM = {
    "model_type": "timm_backbone",
    "backbone": "resnet18",
    "out_indices": [2, 3, 4],
    "use_pretrained_backbone": False,
}
FOCALNET = {
    "model_type": "dino_detr_focalnet",
    "embed_dim": 8,
    "depths": [1, 1, 2, 1],
    "focal_levels": [2, 2, 2, 2],
    "focal_windows": [3, 3, 3, 3],
    "use_conv_embed": True,
    "use_post_layernorm": True,
    "use_layerscale": True,
}
VITDET = {
    "model_type": "vitdet",
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 64,
    "pretrain_image_size": 48,
    "use_relative_position_embeddings": True,
    "window_size": 3,
    "window_block_indices": [0, 1],
}
VIT_PYRAMID = {"model_type": "dino_detr_vit_pyramid", "backbone_config": VITDET, "out_channels": 32}
INTERNIMAGE = {
    "model_type": "dino_detr_internimage",
    "embed_dim": 16,
    "depths": [1, 1, 2, 1],
    "num_groups": [1, 2, 4, 8],
    "drop_path_rate": 0.0,
}
# Small forms of the backbones that this package adds.
OWN_BACKBONES = {
    "dino_detr_focalnet": FOCALNET,
    "dino_detr_vit_pyramid": VIT_PYRAMID,
    "dino_detr_internimage": INTERNIMAGE,
}

# Arguments of a Trainer that says nothing and stays on the CPU.
QUIET = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "use_cpu": True}
SIZES = ((64, 104), (48, 40))  # (height, width) of the two images of a batch
NUM_LABELS = 5


def tiny_config(**changes) -> DinoDetrConfig:
    settings = {
        "backbone_config": dict(RESNET),
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_n_points": 2,
        "decoder_n_points": 3,
        "num_queries": 15,
        "num_labels": NUM_LABELS,
        "num_denoising": 50,
    }
    return DinoDetrConfig(**{**settings, **changes})


def tiny_images() -> tuple[Tensor, Tensor]:
    """(2, 3, 64, 104) pixels, zero on the padding of the second image, and their mask."""
    pixel_values, pixel_mask = torch.randn(2, 3, *SIZES[0]), torch.zeros(2, *SIZES[0], dtype=torch.long)
    for image, (height, width) in enumerate(SIZES):
        pixel_mask[image, :height, :width] = 1
    return pixel_values * pixel_mask[:, None], pixel_mask


def tiny_labels(*counts: int) -> list[dict[str, Tensor]]:
    """Labels of one image for each count, boxes well inside the image."""
    return [
        {
            "class_labels": torch.randint(NUM_LABELS, (count,)),
            "boxes": torch.cat([0.3 + 0.4 * torch.rand(count, 2), 0.1 + 0.4 * torch.rand(count, 2)], dim=1),
        }
        for count in counts
    ]


def tiny_levels(shapes=((6, 9), (3, 5), (1, 2)), valid=((6, 9), (4, 5))) -> FeatureLevels:
    """Geometry of a batch whose images fill `valid` cells (height, width) of the finest level."""
    full_height, full_width = shapes[0]
    masks = []
    for height, width in shapes:
        rows, columns = (torch.arange(size) / size for size in (height, width))
        inside = [
            (rows < image_height / full_height)[:, None] & (columns < image_width / full_width)
            for image_height, image_width in valid
        ]
        masks.append(~torch.stack(inside))
    return describe_levels(masks)


def num_tokens(levels: FeatureLevels) -> int:
    return sum(height * width for height, width in levels.shapes)


def randomize(module: torch.nn.Module, scale: float = 0.3) -> torch.nn.Module:
    """Every parameter drawn anew: a module at its initial values hides mistakes behind its zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=scale)
    return module


def small_trainer(data, folder, model, processor, **settings) -> Trainer:
    """The stock Trainer on `data`, a training and a held-out `CocoData`, as the README sets it up, quiet and on the CPU."""
    train, held_out = data
    transform = DetectionTransform(processor)
    common = {
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "max_grad_norm": 0.1,
        "save_strategy": "no",
        "remove_unused_columns": False,
    }
    args = TrainingArguments(output_dir=str(folder), **QUIET | common | settings)
    return Trainer(
        model=model,
        args=args,
        train_dataset=train.dataset.with_transform(transform),
        eval_dataset=held_out.dataset.with_transform(transform),
        data_collator=DetectionCollator(),
        processing_class=processor,
        compute_metrics=CocoEvaluator(held_out, processor),
        optimizers=(make_optimizer(model, args), None),
    )
