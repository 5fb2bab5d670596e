"""The model that training starts from: a DINO detector, random weights, or random weights on a pretrained backbone."""

import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
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

from ..common.hub_access import reach_hub
from ..common.paths import expand_home
from ..common.regular_files import check_model_folder
from ..inference.loading import fetch_published, load_detector, load_image_processor, similar_names
from ..model.configuration_dino_detr import DinoDetrConfig
from ..model.heads import INITIAL_CLASS_BIAS
from ..model.image_processing_dino_detr import DinoDetrImageProcessor
from ..model.modeling_dino_detr import DinoDetrForObjectDetection
from ..training.class_transfer import transfer_classes
from ..training.coco_data import CocoData
from ..training.recipe import Recipe

BACKBONE = "microsoft/resnet-50"
# First words of `Start.source` without a pretrained detector. The configuration's `provenance` has them too.
_RANDOM = "random weights"
_ON_BACKBONE = f"{_RANDOM}, except the backbone of"
_WEIGHTS = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
# Encoders of the self-supervised DINO, another method with the same name. Its first version is a "vit".
_SELF_SUPERVISED = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext")


class Start(NamedTuple):
    """A model to start from."""

    model: PreTrainedModel  # with the classes of the data
    image_processor: object
    source: str  # where the weights come from, as text
    notes: list[str]  # kept and new classes, as text

    @property
    def pretrained(self) -> str:
        """The pretrained part: "detector", "backbone" or "nothing"."""
        return pretrained_part(self.source)


def pretrained_part(source: str) -> str:
    """The pretrained part of a start, by its `source`: "detector", "backbone" or "nothing"."""
    if source.startswith(_ON_BACKBONE):
        return "backbone"
    return "nothing" if source.startswith(_RANDOM) else "detector"


def load_start(
    source: str | Path | None,
    data: CocoData,
    seed: int,
    backbone: str | None = None,
    architecture: Mapping[str, Any] | None = None,
) -> Start:
    """A detector with the classes of the data. The random generators are unchanged.

    Args:
        source: folder, name of a published checkpoint, or Hub id of a DINO detector. A folder with a configuration but no weights
            gives random weights. None: 4 scales and random weights on a pretrained backbone.
        seed: of random weights.
        backbone: name of the backbone, see `DinoDetrForObjectDetection.from_backbone`. None: `microsoft/resnet-50`.
        architecture: fields of `DinoDetrConfig` for a detector on a backbone.
    Raises:
        FileNotFoundError, OSError: the model does not exist or cannot be downloaded.
        ValueError: the model is not a DINO detector. The message names its type.
    """
    folder = None if source is None else expand_home(fetch_published(source))
    with seeded(seed):
        if folder is None:
            return _on_backbone(backbone, data, architecture or {})
        check_kind(folder if folder.is_dir() else source)
        if (untrained := untrained_source(folder)) is not None and not _has_weights(folder):
            return _from_configuration(folder, data, untrained)
        model = load_detector(source)
        provenance = model.config.provenance
        if isinstance(provenance, dict):
            model.config.provenance = {name: value for name, value in provenance.items() if name != "start"}
        transfer = transfer_classes(model, data.id2label, data.category_ids)
        if untrained is not None:
            return _random_start(model, image_processor_of(source), untrained, provenance["start"])
        return Start(model, image_processor_of(source), str(source), str(transfer).splitlines())


def untrained_source(folder: Path) -> str | None:
    """`Start.source` of a detector that was not trained yet, in a folder. None: it was trained, or there is no folder.

    A detector that `from_backbone` built and `save_pretrained` saved has weights, but its class heads still have their initial
    biases. The first step of a training changes them.
    """
    if not folder.is_dir():
        return None
    if not _has_weights(folder):
        return f"{_RANDOM}: {folder} has a configuration but no weights"
    config, _ = PreTrainedConfig.get_config_dict(folder)
    provenance = config.get("provenance")
    start = provenance.get("start") if isinstance(provenance, dict) else None
    if not isinstance(start, str) or not start.startswith(_RANDOM) or not (folder / SAFE_WEIGHTS_NAME).is_file():
        return None
    try:
        with safe_open(folder / SAFE_WEIGHTS_NAME, framework="pt") as weights:
            names = [name for name in weights.keys() if name.endswith(".class_head.bias")]  # noqa: SIM118  no dictionary
            biases = [weights.get_tensor(name) for name in names]
    except SafetensorError:  # a damaged file; `load_detector` explains it
        return None
    if not biases or any((bias != torch.full_like(bias, INITIAL_CLASS_BIAS)).any() for bias in biases):
        return None
    return f"{_ON_BACKBONE} {folder}" if start.startswith(_ON_BACKBONE) else f"{_RANDOM} of {folder}"


def _has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _WEIGHTS)


def load_trained(source: str | Path) -> tuple[PreTrainedModel, Any]:
    """A trained detector with its own classes, and its image processor.

    Raises:
        FileNotFoundError, OSError: the model does not exist or cannot be downloaded.
        ValueError: it is not a DINO detector, or has no weights.
    """
    folder = expand_home(fetch_published(source))
    check_kind(folder if folder.is_dir() else source)
    if folder.is_dir() and not _has_weights(folder):
        raise ValueError(f"{source} has a configuration but no weights, so the detector has learnt no classes to keep.")
    return load_detector(source), image_processor_of(source)


def adapt_start(start: Start, recipe: Recipe, is_nms_chosen: bool = False) -> list[str]:
    """Set the recipe's `nms` in the image processor, and list the settings that the recipe changes or cannot change.

    Args:
        is_nms_chosen: the user chose `nms`, so it replaces the setting of the image processor. Otherwise the image processor
            keeps its own setting.
    Returns:
        notes for the plan, one sentence each.
    """
    config, processor, notes = start.model.config, start.image_processor, []
    loss, weight = (
        recipe.model_settings.get(name, getattr(config, name)) for name in ("class_loss", "cls_loss_coefficient")
    )
    is_trained = start.pretrained == "detector"
    if is_trained and loss != config.class_loss:
        notes.append(
            f"The class loss changes from {config.class_loss} to {loss}, as in the recipe {recipe.name}; --class-loss "
            f"{config.class_loss} keeps it"
        )
    elif is_trained and loss != "focal" and weight != config.cls_loss_coefficient:
        notes.append(
            f"The weight of the class loss {loss} changes from {config.cls_loss_coefficient:g} to {weight:g}, as in the recipe "
            f"{recipe.name}; --cls-loss-coefficient {config.cls_loss_coefficient:g} keeps it"
        )
    for name, value in recipe.architecture.items():
        if getattr(config, name) != value:
            notes.append(
                f"{name} stays {getattr(config, name)}; new detectors of the recipe {recipe.name} have {value}"
            )
    before = getattr(processor, "nms", recipe.nms)  # image processors of users may have no NMS
    if before != recipe.nms and (is_nms_chosen or before is None):
        processor.nms = recipe.nms and dict(recipe.nms)
        if recipe.nms is None:
            notes.append(f"Detections no longer get {before['method']} NMS")
        else:
            origin = "as you chose" if is_nms_chosen else f"as in the recipe {recipe.name}"
            notes.append(f"Detections get {recipe.nms['method']} NMS, {origin}; --nms none turns it off")
    return notes


_SEEDING = threading.RLock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's CPU generator inside the context, and restore its state afterwards.

    Only one thread at a time is inside. Otherwise a second thread would save the seeded state of the first and restore that one.
    """
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed GPUs, whose state is not restored
        yield


def load_checkpoint(folder: str | Path, source: str, notes: list[str]) -> Start:
    """The model of a run's checkpoint.

    Args:
        source, notes: recorded when the run started.
    """
    model = load_detector(folder)
    model.config._name_or_path = ""  # otherwise the model card would name the checkpoint as the base model
    return Start(model, load_image_processor(folder), source, notes)


def align_memory(model: nn.Module) -> None:
    """Move each parameter and buffer to memory of its own.

    Tensors that are loaded from a file lie where the file has them, and tensors that were made here at multiples of 64 bytes.
    Kernels for CPUs round differently for the two. A resumed run, whose tensors come from a file, would then differ in the last
    bits from a run that started with random weights.
    """
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        tensor.data = tensor.data.clone()


def _on_backbone(backbone: str | None, data: CocoData, architecture: Mapping[str, Any]) -> Start:
    name = backbone or BACKBONE
    try:
        _reach_backbone(name)
        settings = {"id2label": data.id2label, "category_ids": data.category_ids} | dict(architecture)
        model = DinoDetrForObjectDetection.from_backbone(name, **settings)
        image_processor = DinoDetrImageProcessor.from_backbone(name)
    except OSError as error:
        if backbone is not None and not isinstance(error, ConnectionError):
            raise
        training = "Without a model, training" if backbone is None else "Training"
        raise OSError(
            f"{training} starts from the backbone {name} of the Hub, which cannot be downloaded "
            f"({type(error).__name__}). Connect to the internet once, name a folder with a backbone by "
            "--backbone, or a folder with a detector by --model (in Python, backbone=... or model=...)."
        ) from error
    source = f"{_ON_BACKBONE} {name}"
    return _random_start(model, image_processor, source, model.config.provenance["start"])


def _reach_backbone(name: str) -> None:
    """Check quickly that the Hub answers if a backbone is to be downloaded."""
    if not expand_home(name).exists():
        is_timm = "/" not in name or name.startswith("timm/")  # timm reads no configuration from the Hub
        reach_hub(
            f"timm/{name.removeprefix('timm/')}" if is_timm else name,
            file=SAFE_WEIGHTS_NAME if is_timm else CONFIG_NAME,
        )


def _from_configuration(folder: Path, data: CocoData, source: str) -> Start:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.set_classes(data.id2label, data.category_ids)
    model = DinoDetrForObjectDetection(config)
    return _random_start(model, image_processor_of(folder), source, _RANDOM)


def _random_start(model: PreTrainedModel, image_processor, source: str, published_source: str) -> Start:
    """A start from random weights.

    Args:
        published_source: `source` without paths of this machine, for the model card.
    """
    model.config._name_or_path = ""
    model.config.provenance = {"start": published_source}
    num_classes = len(model.config.id2label)
    note = f"All {num_classes} classes start" if num_classes > 1 else "The class starts"
    return Start(model, image_processor, source, [f"{note} from random weights"])


def image_processor_of(source: str | Path | None):
    """The image processor in the folder or repository of a model, otherwise the default one."""
    if source is None:
        return DinoDetrImageProcessor()
    folder = expand_home(source)
    if folder.is_dir() and not (folder / IMAGE_PROCESSOR_NAME).is_file():
        return DinoDetrImageProcessor()
    return load_image_processor(source)


def check_kind(source: str | Path) -> None:
    """Check that a source is a DINO detector, without running code of the model.

    Raises:
        ValueError, FileNotFoundError: it is not.
    """
    folder = expand_home(source)
    if folder.is_file():
        raise ValueError(
            f"{source} is a file. Convert a checkpoint of the original release, detrex or mmdetection with `dino-hf convert`, "
            "and name the folder that it writes."
        )
    if folder.is_dir() and (folder / ADAPTER_CONFIG_NAME).is_file() and not _has_weights(folder):
        raise FileNotFoundError(
            f"{source} has only adapters of a model. Use the finished folder of the run, which has them merged into the weights, "
            "or merge them first: model.merge_and_unload().save_pretrained(...)."
        )
    if folder.is_dir() and not (folder / CONFIG_NAME).is_file():
        raise FileNotFoundError(
            f"{source} is not a model: it has no {CONFIG_NAME}. Use the folder that save_pretrained or a training run wrote."
        )
    try:
        if folder.is_dir():
            check_model_folder(folder)
        else:
            reach_hub(str(source))
        config, _ = PreTrainedConfig.get_config_dict(source)
    except OSError as error:
        raise FileNotFoundError(
            f"There is no folder {source}, and the Hub has no readable model of this name ({type(error).__name__}). Use the folder "
            f"or the Hub id of a DINO detector.{similar_names(source)}"
        ) from error
    except RecursionError as error:
        raise ValueError(f"The {CONFIG_NAME} of {source} is nested too deeply; use another model.") from error
    kind = config.get("model_type")
    if kind == DinoDetrConfig.model_type:
        return
    if kind in _SELF_SUPERVISED:
        found = f"an encoder of type {kind!r}, which belongs to the self-supervised DINO, a method that does not detect objects"
    elif kind in MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES:
        found = f"another detector, of type {kind!r}, which can be evaluated and used (dino-hf eval, dino-hf predict)"
    else:
        found = f"a model of type {kind!r}"
    raise ValueError(
        f"{source} is {found}. Training needs a DINO detector, of type {DinoDetrConfig.model_type!r}. Without a model, training "
        f"starts from the backbone {BACKBONE}."
    )
