"""Recipes by name: how published detectors were trained."""

import dataclasses

from .augmentation import Augmentation
from .recipe import DINO_LOSS, MODEL_SETTINGS, RELEASE_SETTINGS, Recipe

_PAPER = RELEASE_SETTINGS | DINO_LOSS

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe("paper-12ep", 12, lr_drop_epochs=(11,)),
        Recipe("paper-24ep", 24, lr_drop_epochs=(20,)),
        Recipe("paper-36ep", 36, lr_drop_epochs=(30,)),
        # detrex: AP 50.0 instead of 49.2 with an R50 in 12 epochs. Denoising keeps a class weight of 1. In mmdetection's "improved"
        # (AP 50.1), denoising has the class weight 2 as well, and all parts except the backbone and the sampling offsets are
        # trained at 2e-4.
        Recipe(
            "better-hyper",
            12,
            lr_drop_epochs=(11,),
            backbone_learning_rate=2e-5,
            model_settings=_PAPER
            | {"num_denoising": 300, "cls_loss_coefficient": 2.0, "denoising_cls_loss_coefficient": 1.0},
        ),
        # Co-DINO's main branch (arXiv:2211.12860): AP 52.1 with an R50 and 5 scales, together with one-to-many heads in training,
        # which are not part of this recipe, and with soft NMS.
        Recipe(
            "co-dino",
            12,
            lr_drop_epochs=(11,),
            learning_rate=2e-4,
            backbone_learning_rate=2e-5,
            model_settings=_PAPER | {"class_loss": "quality_focal"},
            nms={"method": "soft", "iou_threshold": 0.8},
        ),
        # Align-DETR (arXiv:2304.07527) in detrex: AP 50.3 with an R50 and 4 scales; 51.4 in 24 epochs, with the drop after 20.
        Recipe(
            "align-detr",
            12,
            lr_drop_epochs=(11,),
            model_settings=_PAPER | {"class_loss": "align_detr", "queries_per_box": 2},
        ),
        # Stable-DINO (arXiv:2304.04742): AP 50.4 with an R50 and 4 scales, evaluated with hard NMS.
        Recipe(
            "stable-dino",
            12,
            lr_drop_epochs=(11,),
            model_settings=_PAPER
            | {
                "class_loss": "stable_dino",
                "cls_loss_coefficient": 6.0,
                "denoising_cls_loss_coefficient": 1.0,
                "negative_noise_start": 0.0,
            },
            architecture={"encoder_fusion": True},
            nms={"method": "hard", "iou_threshold": 0.8},
        ),
        # For a few hundred to a few thousand images and weights trained on COCO. Not measured on a benchmark.
        # - 8 images per step, for one GPU. The learning rates of the release are scaled linearly to them.
        # - Warm-up: new class heads start at random. Their first gradients should not disturb the pretrained weights.
        # - Cosine and early stopping: the best number of epochs for a small data set is not known beforehand. 50 epochs are enough.
        # - The detector keeps its class loss. DINO and its variants have different ones.
        # - EMA over about 500 steps: the release's 0.9997 averages over 3,300 steps, more than a small run may have.
        Recipe(
            "finetune",
            50,
            lr_scheduler="cosine",
            warmup_steps=0.05,
            learning_rate=5e-5,
            backbone_learning_rate=5e-6,
            total_batch_size=8,
            model_settings=dict(RELEASE_SETTINGS),
            ema_decay=0.998,
            ema_warmup_steps=100,
            early_stopping_patience=10,
        ),
        # For new detectors on a pretrained backbone. Only the first 156 steps were measured, on one small data set; the number of
        # epochs was not.
        # - All weights but the backbone's start at random, so they learn four times as fast as in the release. The backbone keeps a
        #   tenth of their learning rate.
        # - Cosine and early stopping, as in "finetune": the best number of epochs is not known beforehand.
        Recipe(
            "from-backbone",
            50,
            lr_scheduler="cosine",
            warmup_steps=0.05,
            learning_rate=4e-4,
            backbone_learning_rate=4e-5,
            total_batch_size=4,
            model_settings=dict(RELEASE_SETTINGS),
            early_stopping_patience=10,
        ),
        # For small models without pretrained weights and a few thousand steps, as in the demo. It has one learning rate for all
        # parameters and no crops. Box noise is weaker, and the class weight higher, than with pretrained weights.
        Recipe(
            "scratch",
            3,
            lr_scheduler="cosine",
            warmup_steps=0.02,
            learning_rate=7e-4,
            backbone_learning_rate=7e-4,
            max_grad_norm=5.0,
            total_batch_size=4,
            model_settings=RELEASE_SETTINGS
            | {"num_denoising": 50, "box_noise_scale": 0.4, "cls_loss_coefficient": 3.0},
            augmentation=Augmentation(short_sides=(800,), crop=0.0),
        ),
    )
}


def get_recipe(name: str, /, **changes) -> Recipe:
    """A recipe by name, with changed fields: `get_recipe("paper-12ep", num_train_epochs=6, lr_drop_epochs=(5,))`.

    Args:
        changes: fields of `Recipe`. `model_settings` are merged into the recipe's. A schedule without steps has no
            `lr_drop_epochs` by default.
    Raises:
        ValueError: an unknown name or field, or an invalid value.
    """
    if not isinstance(name, str) or name not in RECIPES:
        raise ValueError(f"There is no recipe {name!r}; there are {sorted(RECIPES)}.")
    fields = [field.name for field in dataclasses.fields(Recipe)]
    if unknown := sorted(set(changes) - set(fields)):
        settings = {field: changes[field] for field in unknown if field in MODEL_SETTINGS}
        hint = f"; model_settings={settings} sets what belongs to the model" if settings else ""
        raise ValueError(f"A recipe has no {unknown}; it has {fields}{hint}.")
    if changes.get("lr_scheduler", "step") != "step":
        changes.setdefault("lr_drop_epochs", ())
    settings = changes.get("model_settings", {})
    if isinstance(settings, dict):
        changes["model_settings"] = RECIPES[name].model_settings | settings
    return dataclasses.replace(RECIPES[name], **changes)
