"""What training starts from: a detector of ours, a configuration with random weights, or an R50 with a published backbone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, ResNetBackbone
from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    IMAGE_PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ..common.paths import expand_home
from ..common.regular_files import check_model_folder
from ..data.hub_access import reach_hub
from ..inference.loading import load_detector, load_image_processor
from ..model.configuration_dino_detr import DinoDetrConfig
from ..model.image_processing_dino_detr import DinoDetrImageProcessor
from ..model.modeling_dino_detr import DinoDetrForObjectDetection
from ..training.class_transfer import transfer_classes
from ..training.coco_data import CocoData

BACKBONE = "microsoft/resnet-50"
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
# Encoders that were trained by self-distillation, which is also called DINO; "vit" is that of the first one.
_SELF_SUPERVISED = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext")


class Start(NamedTuple):
    model: PreTrainedModel  # with the classes of the data
    image_processor: object
    source: str  # for people: where the weights come from
    notes: list[str]  # what became of the classes


def load_start(source: str | Path | None, data: CocoData, seed: int) -> Start:
    """A detector for the classes of the data. Random numbers go on as if none had been drawn.

    Args:
        source: folder or id on the Hub of a DINO detector; a folder with a configuration and no weights starts from random ones;
            None: R50 with 4 scales, whose backbone is `microsoft/resnet-50`.
        seed: of random weights.
    Raises:
        FileNotFoundError, OSError: there is no such model, or it cannot be fetched.
        ValueError: it is a model of another kind; the message says of which.
    """
    with _seeded(seed):
        if source is None:
            return _default(data)
        _check_kind(source)
        folder = expand_home(source)
        if folder.is_dir() and not any((folder / name).is_file() for name in _WEIGHTS):
            return _from_configuration(folder, data)
        model = load_detector(source)
        provenance = model.config.provenance
        if isinstance(provenance, dict):
            model.config.provenance = {name: value for name, value in provenance.items() if name != "start"}
        transfer = transfer_classes(model, data.id2label, data.category_ids)
        return Start(model, image_processor_of(source), str(source), str(transfer).splitlines())


_SEEDING = threading.RLock()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's generator of the CPU within, and give its state back after.

    One thread at a time: a second one would otherwise keep the seeded state of the first, and leave that behind.
    """
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed GPUs, whose state is not kept
        yield


def load_checkpoint(folder: str | Path, source: str, notes: list[str]) -> Start:
    """The model of a checkpoint of a run, which has its classes; what the run started from stays on record."""
    model = load_detector(folder)
    model.config._name_or_path = ""  # else the card would call the checkpoint what training started from
    return Start(model, load_image_processor(folder), source, notes)


def _default(data: CocoData) -> Start:
    config = DinoDetrConfig(id2label=data.id2label, category_ids=data.category_ids)
    stages = config.backbone_config.out_features
    try:
        reach_hub(BACKBONE)
        backbone = ResNetBackbone.from_pretrained(BACKBONE, out_features=stages)
    except OSError as error:
        raise OSError(
            f"Without a model, training starts from the backbone {BACKBONE} of the Hub, which cannot be fetched "
            f"({type(error).__name__}): go online once, or name a folder with a detector by --model (in Python, model=...)."
        ) from error
    model = DinoDetrForObjectDetection(config)
    model.model.backbone.model.load_state_dict(backbone.state_dict())
    source = f"random weights, but for the backbone of {BACKBONE}"
    return _random_start(model, DinoDetrImageProcessor(), source)


def _from_configuration(folder: Path, data: CocoData) -> Start:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.set_classes(data.id2label, data.category_ids)
    model = DinoDetrForObjectDetection(config)
    return _random_start(
        model, image_processor_of(folder), f"random weights: {folder} has a configuration and no weights"
    )


def _random_start(model: PreTrainedModel, image_processor, source: str) -> Start:
    model.config._name_or_path = ""
    model.config.provenance = {"start": source.partition(":")[0]}
    num_classes = len(model.config.id2label)
    note = f"All {num_classes} classes start" if num_classes > 1 else "The class starts"
    return Start(model, image_processor, source, [f"{note} from random weights"])


def image_processor_of(source: str | Path | None):
    """The one beside a model, else the default one."""
    if source is None:
        return DinoDetrImageProcessor()
    folder = expand_home(source)
    if folder.is_dir() and not (folder / IMAGE_PROCESSOR_NAME).is_file():
        return DinoDetrImageProcessor()
    return load_image_processor(source)


def _check_kind(source: str | Path) -> None:
    """Raises ValueError, FileNotFoundError: it is no DINO detector. No code of the model is run, nor its class looked for."""
    folder = expand_home(source)
    if folder.is_file():
        raise ValueError(
            f"{source} is a file. Convert a checkpoint of the original release, detrex or mmdetection with `dino-hf convert`, "
            "and name the folder that it writes."
        )
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        what = (
            "adapters of a model: merge them first, model.merge_and_unload().save_pretrained(...)"
            if (folder / ADAPTER_CONFIG_NAME).is_file()
            else f"no model: it has no {CONFIG_NAME}; give the folder that save_pretrained or a training run wrote"
        )
        raise FileNotFoundError(f"{source} is {what}.")
    try:
        if folder.is_dir():
            check_model_folder(folder)
        else:
            reach_hub(str(source))
        config, _ = PreTrainedConfig.get_config_dict(source)
    except OSError as error:
        raise FileNotFoundError(
            f"There is no folder {source}, and no model of that name that the Hub gives ({type(error).__name__}); give the folder "
            "of a DINO detector, or its id."
        ) from error
    except RecursionError as error:
        raise ValueError(f"The {CONFIG_NAME} of {source} is nested too deeply; give another model.") from error
    kind = config.get("model_type")
    if kind == DinoDetrConfig.model_type:
        return
    if kind in _SELF_SUPERVISED:
        what = (
            f"an encoder of type {kind!r}, as of the self-supervised DINO, which has the same name and finds no objects"
        )
    elif kind in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
        what = f"another detector, of type {kind!r}, which can be evaluated and used (dino-hf eval, dino-hf predict)"
    else:
        what = f"a model of type {kind!r}"
    raise ValueError(
        f"{source} is {what}; training is for DINO detectors, of type {DinoDetrConfig.model_type!r}: give one, or none, which "
        f"starts from the backbone {BACKBONE}."
    )
