"""The model card: README.md beside the weights, from what the configuration knows of them and nothing else."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import Tensor, nn

from .card_text import code_span, escape_markdown, one_line
from .coco_classes import coco_class_space
from .sharing import read_remote_card

logger = logging.getLogger(__name__)

FILE_NAME = "README.md"
TAGS = ("object-detection", "vision", "dino_detr", "dino", "detr")
_MARKER = re.compile(r"\n*<!-- Written by dino_hf ([0-9a-f]{16})\.[^\n]*-->\s*$")
_PROJECTS = {
    "original": "the original release (https://github.com/IDEA-Research/DINO)",
    "detrex": "detrex (https://github.com/IDEA-Research/detrex)",
    "mmdet": "MMDetection (https://github.com/open-mmlab/mmdetection)",
}
_BACKBONES = {"resnet": "ResNet", "swin": "Swin", "convnext": "ConvNeXt", "bit": "BiT", "timm_backbone": "timm"}
_METRICS = {
    "AP": "AP, mean over IoU 0.50 to 0.95",
    "AP50": "AP at IoU 0.50",
    "AP75": "AP at IoU 0.75",
    "AP_small": "AP of small objects",
    "AP_medium": "AP of medium objects",
    "AP_large": "AP of large objects",
    "AR_1": "AR with 1 detection per image",
    "AR_10": "AR with 10 detections per image",
    "AR_100": "AR with 100 detections per image",
    "AR_small": "AR of small objects",
    "AR_medium": "AR of medium objects",
    "AR_large": "AR of large objects",
}
_OF_CLASS = "AP_class_"
_MOST_CLASSES = 400  # that are listed
_MOST_ROWS = 400  # of a table
_MOST_NAMES = 50  # of settings in a sentence
_THRESHOLD = 0.4  # in the example, where the best one is not known
_URL = re.compile(r"https?://[\w.~:/?#@!$&'()*+,;=%-]+", re.ASCII)  # nothing that ends a link or starts HTML


# ---------------------------------------------------------------------------------------------------------------------
# Weights: are they still those that the record tells of?


def weights_digest(model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> str | None:
    """Names the weights: other names, shapes, types or bits of any tensor give another digest. So does a cast, for the weights
    then compute something else; another device does not. Tensors are copied to the CPU one at a time.

    Args:
        model: `DinoDetrForObjectDetection` or `DinoDetrModel`, which have the same digest with the same detector.
        state_dict: of the model, where it is not to be asked for its own.
    Returns:
        16 hex digits; None if not every weight is here as a plain tensor, but offloaded, sharded or quantized.
    """
    if state_dict is None:
        if _is_sharded(model):
            return None
        state_dict = model.state_dict()
    prefix, digest = f"{model.base_model_prefix}.", hashlib.sha256()
    tensors = {name.removeprefix(prefix): tensor for name, tensor in state_dict.items()}
    for name, tensor in sorted(tensors.items()):  # by name: no two are the same
        if not _is_plain(tensor):
            return None
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16] if state_dict else None


def digest_to_compare(model: nn.Module, state_dict: dict[str, Tensor] | None = None) -> str | None:
    """`weights_digest` if `config.provenance` has one that the card compares it with; else it is not computed."""
    return weights_digest(model, state_dict) if _Facts(model.config.provenance).recorded_digest else None


def _is_sharded(model: nn.Module) -> bool:
    """By FSDP 1, where asking for the state dict is a call that all processes must make, or by DeepSpeed's ZeRO 3."""
    is_fsdp = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    return is_fsdp or any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _is_plain(value: Any) -> bool:
    is_tensor = type(value) in (Tensor, nn.Parameter)  # no subclass: a DTensor holds a part
    return is_tensor and not value.is_meta and not value.is_quantized and value.layout == torch.strided


# ---------------------------------------------------------------------------------------------------------------------
# Files: whose card is it?


def write_model_card(
    folder: str | Path,
    config,
    num_parameters: int,
    tags: Sequence[str] = (),
    name: str | None = None,
    weights: str | None = None,
) -> bool:
    """Write README.md into a folder. A README.md that a user wrote or edited is kept.

    Args:
        config: `DinoDetrConfig`.
        name: that the card's code loads; the folder's by default.
        weights: digest of those that lie beside the card, see `digest_to_compare`.
    Returns:
        whether the card is ours.
    """
    folder = Path(folder)
    present = read_card(folder)
    if present is not None and not is_ours(present):
        return False
    text = model_card(config, num_parameters, name or folder.resolve().name, tags, weights, folder)
    (folder / FILE_NAME).write_text(text, encoding="utf-8", newline="\n")
    return True


def settle_model_card(
    folder: str | Path,
    config,
    num_parameters: int,
    repo_id: str,
    own: str | None = None,
    tags: Sequence[str] = (),
    token: str | bool | None = None,
    weights: str | None = None,
) -> None:
    """Write the README.md that is uploaded: a card of the user's, `own` from the folder before the one from the repository,
    and tags are all that it gets; else ours, which takes the place of an older one of ours.

    Args:
        own: what stood in the folder.
        weights: as for `write_model_card`.
    Raises:
        huggingface_hub.errors.HfHubHTTPError: the repository cannot be read.
    """
    remote = read_remote_card(repo_id, token)
    known = [] if remote is None else remote.data.tags or []
    new = [tag for tag in tags if tag not in known]
    texts = (own, None if remote is None else str(remote))
    theirs = next((text for text in texts if text is not None and not is_ours(text)), None)
    if theirs is None:
        text = model_card(config, num_parameters, repo_id, [*known, *new], weights, folder)
    else:
        text = _with_tags(theirs, new)
    (Path(folder) / FILE_NAME).write_text(text, encoding="utf-8", newline="")


def read_card(folder: str | Path) -> str | None:
    """The text of README.md, None where there is none."""
    file = Path(folder) / FILE_NAME
    if not file.is_file():
        return None
    with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:  # newline: as it is
        return stream.read()


def is_ours(text: str) -> bool:
    """Whether `model_card` wrote this text and it was not edited since. Line ends, the layout of the metadata, and tags do not
    count, because the library and the Hub change them."""
    marker = _MARKER.search(text)
    return marker is not None and _digest(text[: marker.start()]) == marker[1]


def _with_tags(text: str, tags: Sequence[str]) -> str:
    if not tags:
        return text
    try:
        card = ModelCard(text)
    except Exception as error:  # of yaml, and of what the library checks
        logger.warning(
            "The tags %s are not added to the model card, whose metadata cannot be read: %s", list(tags), error
        )
        return text
    card.data.tags = _unique([*(card.data.tags or []), *tags])
    return str(card)


def _digest(text: str) -> str:
    """Of a card without its last line."""
    try:
        card = ModelCard(text.replace("\r\n", "\n"))
    except Exception:  # metadata that are none any more: edited
        return ""
    data = {name: value for name, value in card.data.to_dict().items() if name != "tags"}
    content = json.dumps(data, sort_keys=True, default=str) + card.text.strip()
    return hashlib.sha256(content.encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Text


def model_card(
    config,
    num_parameters: int,
    name: str,
    tags: Sequence[str] = (),
    weights: str | None = None,
    folder: str | Path | None = None,
) -> str:
    """The text of a model card. Entries of `config.provenance` in an unknown form are left out, and the card names them.

    Args:
        config: `DinoDetrConfig`.
        name: folder or repository that the code in the card loads.
        tags: more than the usual ones.
        weights: digest of those that the card is about; without it, they are taken to be those of the record.
        folder: that the card is for; pictures of the record that lie there are shown.
    """
    facts = _Facts(config.provenance, weights)
    sections = [
        f"# DINO object detector: {escape_markdown(one_line(_backbone(config)))}, {config.num_feature_levels} scales",
        "DINO (DETR with Improved deNoising anchOr boxes, [arXiv:2203.03605](https://arxiv.org/abs/2203.03605)), as dino_hf "
        "implements it for Transformers: the object detector, not the self-supervised DINO.",
        "## Weights",
        *_weights(facts),
        *_training(facts, folder),
        "## Classes",
        _classes(config),
        "## Use",
        *_use(name, facts),
        "## Architecture",
        _table(("", ""), _architecture(config, num_parameters)),
        "## Licence",
        _licence(facts),
    ]
    if facts.unread:
        left_out = _listed(facts.unread, _MOST_NAMES)
        sections.append(f"The record in `config.provenance` could not be read as a whole; left out: {left_out}.")
    body = "\n\n".join(sections)
    text = f"---\n{_metadata(facts, name, tags).to_yaml()}\n---\n\n{body}"
    marker = f"Written by dino_hf {_digest(text)}. Saving the model writes it anew until somebody edits it."
    return f"{text}\n\n<!-- {marker} -->\n"


class _Facts:
    """What a provenance says, as far as it has the expected form; the rest is listed in `unread`. And whether it says so of the
    weights here, whose digest is `weights`."""

    def __init__(self, provenance: Any, weights: str | None = None):
        self.unread: list[str] = []
        self.weights = weights
        everything = self._part({"provenance": provenance}, "", "provenance") or {}
        converted = self._part(everything, "", "converted_from")
        if converted is not None:
            where, keys = "converted_from.", ("project", "file", "sha256", "url", "weights", "published")
            converted = {
                **{key: self._text(converted, where, key) for key in keys},
                "published_ap": self._number(converted, where, "published_ap"),
                "assumed": self._part(converted, where, "assumed") or {},
            }
        self.converted = converted
        self.base_model = self._text(everything, "", "base_model")
        self.license = self._text(everything, "", "license")
        self.start = self._text(everything, "", "start")  # of training, where that was no model
        self.training = training = self._part(everything, "", "training")
        if training is None and everything.get("training") is not None:
            training = {}  # unreadable, but no reason to call the weights untrained
        self.evaluation, self.metrics, self.intervals = None, {}, {}
        self.objects, self.best, self.pictures, self.test = {}, {}, {}, None
        self.is_measured_after = False
        if training is not None:
            self.training = self._data(training, "training.")
            self.training["steps"] = self._number(training, "training.", "steps")
            self.training["recipe"] = self._part(training, "training.", "recipe") or {}
            self.training["selected"] = self._text(training, "training.", "selected")
            evaluation = self._part(training, "training.", "evaluation")
            if evaluation is not None:
                where = "training.evaluation."
                self.evaluation = self._data(evaluation, where) | {
                    "step": self._number(evaluation, where, "step"),
                    "weights": self._text(evaluation, where, "weights"),
                }
                self.metrics, self.intervals = self._scores(evaluation, where)
                self.objects = self._numbers(evaluation, where, "objects")
                self.best = self._numbers(evaluation, where, "best")
                self.is_measured_after = evaluation.get("after_training") is True
                pictures = self._part(evaluation, where, "pictures") or {}
                self.pictures = {key: self._text(pictures, f"{where}pictures.", key) for key in pictures}
                if test := self._part(evaluation, where, "test"):
                    self.test = self._data(test, f"{where}test.")
                    self.test["metrics"], self.test["intervals"] = self._scores(test, f"{where}test.")

    @property
    def recorded_digest(self) -> str | None:
        """Of the weights that the record's last word on AP is about: those evaluated, or without training those converted."""
        part = self.converted if self.training is None else self.evaluation
        return None if part is None else part["weights"]

    @property
    def are_changed(self) -> bool | None:
        """Whether the weights here are others than those; None if that cannot be told."""
        return None if None in (self.weights, self.recorded_digest) else self.weights != self.recorded_digest

    @property
    def is_of_these_weights(self) -> bool:
        """Whether what was measured was measured on the weights here: training may have gone on, with a record or without."""
        if self.are_changed is None:
            return bool(self.metrics) and self.evaluation["step"] == self.training["steps"]
        return bool(self.metrics) and not self.are_changed

    def _data(self, part: dict, where: str) -> dict:
        return {"dataset": self._text(part, where, "dataset"), "num_images": self._number(part, where, "num_images")}

    def _scores(self, part: dict, where: str) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Metrics and their intervals."""
        # -1 is COCO's word for "nothing to measure".
        metrics = {key: value for key, value in self._numbers(part, where, "metrics").items() if value >= 0}
        intervals = self._part(part, where, "intervals") or {}
        pairs = {one_line(key): self._checked(intervals, f"{where}intervals.", key, _is_interval) for key in intervals}
        return metrics, {key: pair for key, pair in pairs.items() if pair is not None}

    def _numbers(self, parent: dict, where: str, key: str) -> dict[str, float]:
        part = self._part(parent, where, key) or {}
        values = {one_line(name): self._number(part, f"{where}{key}.", name) for name in part}
        return {name: value for name, value in values.items() if value is not None}

    def _part(self, parent: dict, where: str, key: str) -> dict | None:
        return self._checked(parent, where, key, lambda value: isinstance(value, dict))

    def _number(self, parent: dict, where: str, key: str) -> float | int | None:
        return self._checked(parent, where, key, _is_number)

    def _text(self, parent: dict, where: str, key: str) -> str | None:
        value = self._checked(parent, where, key, lambda value: isinstance(value, str))
        return None if value is None else one_line(value) or None

    def _checked(self, parent: dict, where: str, key: str, is_right) -> Any:
        value = parent.get(key)
        if value is None or is_right(value):
            return value
        self.unread.append(code_span(f"{where}{key}"))
        return None


def _weights(facts: _Facts) -> list[str]:
    sentences = []
    if facts.converted is not None:
        sentences += _conversion(facts)
    if facts.training is None:
        if facts.base_model:
            sentences.append(f"They are recorded as made from {code_span(_place(facts.base_model))}.")
        if not sentences:
            sentences.append(
                "There is no record of where the weights come from. They may be random: nothing here says that they were trained."
            )
        return [" ".join(sentences)]
    start = (
        code_span(_place(facts.base_model))
        if facts.base_model
        else escape_markdown(facts.start or "weights of which there is no record")
    )
    if facts.converted is not None and not facts.base_model:
        start = "the converted weights"
    data = _of_data(facts.training)
    sentences.append(f"The weights here were trained{f' on {data}' if data else ''}, starting from {start}.")
    if facts.training["selected"]:
        sentences.append(f"They are {escape_markdown(facts.training['selected'])}.")
    return [" ".join(sentences)]


def _conversion(facts: _Facts) -> list[str]:
    """Sentences."""
    converted, is_trained = facts.converted, facts.training is not None
    is_changed = not is_trained and facts.are_changed
    file = f"the file {code_span(converted['file'])}" if converted["file"] else "a file"
    digest = f" (sha256 {code_span(converted['sha256'])})" if converted["sha256"] else ""
    project = _PROJECTS.get(converted["project"]) or escape_markdown(converted["project"] or "")
    of_project = f" of {project}" if project else ""
    subject = "The weights that training started from" if is_trained else "The weights"
    changed = ", and changed since; nothing is recorded of how" if is_changed else ""
    sentences = [f"{subject} were converted from {file}{digest}{of_project}{changed}."]
    if converted["published"]:
        sentences.append(f"That file is the checkpoint published as {escape_markdown(converted['published'])}.")
    if converted["url"]:
        is_address = _URL.fullmatch(converted["url"])
        sentences.append(f"Source: {'<' + converted['url'] + '>' if is_address else code_span(converted['url'])}.")
    if converted["published_ap"] is not None:
        sentences.append(
            f"**Published AP: {converted['published_ap']}**, as its authors report it and not measured by us"
            + ("; it belongs to that file and not to the weights here." if is_trained or is_changed else ".")
        )
    if converted["assumed"]:
        settings = _listed([code_span(f"{key}={value}") for key, value in converted["assumed"].items()], _MOST_NAMES)
        sentences.append(f"The file does not tell all settings; assumed were {settings}.")
    return sentences


def _training(facts: _Facts, folder: str | Path | None) -> list[str]:
    if facts.training is None:
        return []
    sections = []
    steps, recipe = facts.training["steps"], facts.training["recipe"]
    if recipe or steps is not None:
        rows = [(str(key).replace("_", " "), value) for key, value in recipe.items() if value is not None]
        if steps is not None:
            rows.append(("optimizer steps behind these weights", f"{steps:,}"))
        sections += ["## Training", _table(("setting", "value"), rows)]
    sections.append("## Evaluation")
    if not facts.metrics:
        return [*sections, "No AP of these weights was recorded."]
    data = _of_data(facts.evaluation)
    when = "after training" if facts.is_measured_after else "in training"
    sections.append(f"Measured {when}{f', on {data}' if data else ''}.")
    if not facts.is_of_these_weights:
        measured, now = (
            "an unknown step" if step is None else f"step {step:,}" for step in (facts.evaluation["step"], steps)
        )
        if measured != now:
            sections[-1] += f" This was at {measured}; the weights here are those of {now}, whose AP was not measured."
        else:
            sections[-1] += (
                " The weights were changed since, and nothing is recorded of how; AP was not measured for the weights here."
            )
    return [*sections, *_scores(facts), *_pictures(facts, folder)]


def _scores(facts: _Facts) -> list[str]:
    """Tables, and sentences on the threshold and on test images."""
    sections = []
    of_class = [key for key in facts.metrics if key.startswith(_OF_CLASS)]
    known = [key for key in _METRICS if key in facts.metrics]  # json may have brought another order
    labels = {key: _METRICS.get(key, key) for key in [*known, *facts.metrics] if key not in of_class}
    if not facts.objects:  # else the classes have a table of their own
        labels |= {key: f"AP of {key.removeprefix(_OF_CLASS)}" for key in of_class}
    rows = [(label, f"{facts.metrics[key]:.3f}", _interval(facts.intervals, key)) for key, label in labels.items()]
    if facts.intervals:
        sections += ["Intervals are of 95 %, by a bootstrap over the images.", _table(("", "value", "interval"), rows)]
    else:
        sections.append(_table(("", "value"), [row[:2] for row in rows]))
    if {"threshold", "f1", "precision", "recall"} <= facts.best.keys():
        threshold, f1, precision, recall = (facts.best[key] for key in ("threshold", "f1", "precision", "recall"))
        sections.append(
            f"**Best threshold: {threshold:.2f}**, where F1 is highest over all classes: {f1:.3f}, with precision {precision:.3f} "
            f"and recall {recall:.3f} at IoU 0.50."
        )
    if facts.test is not None and "AP" in facts.test["metrics"]:
        interval = _interval(facts.test["intervals"], "AP")
        sections.append(
            f"On {_of_data(facts.test) or 'test images'}, which nothing was chosen by: **AP {facts.test['metrics']['AP']:.3f}**"
            + (f" ({interval})." if interval else ".")
        )
    if facts.objects:
        rows = [
            (name, count, f"{value:.3f}" if (value := facts.metrics.get(_OF_CLASS + name)) is not None else "")
            for name, count in facts.objects.items()
        ]
        rows = [(*row, _interval(facts.intervals, _OF_CLASS + row[0])) for row in rows]
        sections.append(_table(("class", "objects", "AP", "interval"), rows))
    return sections


def _interval(intervals: dict[str, list[float]], key: str) -> str:
    return "{:.3f} to {:.3f}".format(*intervals[key]) if key in intervals else ""


def _pictures(facts: _Facts, folder: str | Path | None) -> list[str]:
    """Of those that lie beside the card, and only for the weights that they show."""
    if folder is None or not facts.is_of_these_weights:
        return []
    return [
        f"![{escape_markdown(caption.replace('[', '(').replace(']', ')'))}]({name})"
        for name, caption in facts.pictures.items()
        if caption and re.fullmatch(r"[\w-]+\.png", name) and (Path(folder) / name).is_file()
    ]


def _classes(config) -> str:
    names, ids = dict(config.id2label), config.category_ids
    known = coco_class_space(len(names))
    if known is not None and names == known[0]:
        if len(names) == 91:
            what = (
                "91 outputs for the 80 categories of COCO: the class index is the raw COCO category id, and an id without a "
                'category is "N/A".'
            )
        else:
            what = "The 80 categories of COCO in the order of their ids"
            what += ", which `config.category_ids` has." if ids == known[1] else "."
    elif all(name == f"LABEL_{index}" for index, name in names.items()):
        return f"{len(names)} classes, whose names were not recorded."
    else:
        what = f"{len(names)} classes"
        if ids is not None and ids != list(names):
            what += ", each with its category id in the annotations that it was trained on (`config.category_ids`)"
        what += "."
    shown = [index for index, name in names.items() if name != "N/A"]
    listed = [
        escape_markdown(one_line(names[index]))
        + (f" ({ids[index]})" if ids is not None and ids[index] != index else "")
        for index in shown[:_MOST_CLASSES]
    ]
    more = len(shown) - len(listed)
    return f"{what}\n\n{', '.join(listed)}{f', and {more} more in `config.id2label`' if more > 0 else ''}"


def _use(name: str, facts: _Facts) -> list[str]:
    threshold = facts.best.get("threshold", _THRESHOLD) if facts.is_of_these_weights else _THRESHOLD
    model = json.dumps(one_line(name, 1000).replace("`", "'"), ensure_ascii=False)  # no name may end the code
    call = (
        f'detector("street.jpg", threshold={round(threshold, 2)})'
        '  # [{"score": ..., "label": ..., "box": {"xmin": ..., ...}}, ...]'
    )
    return [
        "With dino_hf installed, whose kernels make it faster:",
        f'```python\nimport dino_hf\nfrom transformers import pipeline\n\ndetector = pipeline("object-detection", model={model})\n'
        f"{call}\n```",
        "Without it, by the code that stands here beside the weights (training needs scipy). Transformers then logs that the model "
        '"is not supported for object-detection"; that is harmless.',
        '```python\nfrom transformers import pipeline\n\ndetector = pipeline("object-detection", model='
        f"{model}, trust_remote_code=True)\n{call}\n```",
    ]


def _architecture(config, num_parameters: int) -> list[tuple[str, str]]:
    return [
        ("backbone", _backbone(config)),
        ("feature levels", config.num_feature_levels),
        ("queries", config.num_queries),
        ("layers", f"{config.encoder_layers} encoder, {config.decoder_layers} decoder"),
        ("width", config.d_model),
        ("outputs (classes)", len(config.id2label)),
        ("parameters", f"{num_parameters / 1e6:.1f} M"),
    ]


def _backbone(config) -> str:
    backbone = config.backbone_config
    kind = _BACKBONES.get(backbone.model_type, backbone.model_type)
    if backbone.model_type == "timm_backbone":
        return f"{kind} {backbone.backbone}"
    depths = getattr(backbone, "depths", None)
    return f"{kind} of depths {'-'.join(map(str, depths))}" if depths else kind


def _licence(facts: _Facts) -> str:
    weights = (
        f"Weights: {escape_markdown(facts.license)}." if facts.license else "No licence of the weights is recorded."
    )
    return f"{weights} The Python files here are those of dino_hf, Apache-2.0."


def _metadata(facts: _Facts, name: str, tags: Sequence[str]) -> ModelCardData:
    optional = {}
    if facts.license:
        identifier = facts.license.lower()
        is_identifier = re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", identifier)
        optional |= {"license": identifier} if is_identifier else {"license": "other", "license_name": facts.license}
    if facts.base_model and _is_repository(facts.base_model):
        optional["base_model"] = facts.base_model
    if facts.training is not None and (dataset := facts.training["dataset"]) and _is_repository(dataset):
        optional["datasets"] = [dataset]
    if facts.is_of_these_weights and (measured := [key for key in ("AP", "AP50", "AP75") if key in facts.metrics]):
        dataset = facts.evaluation["dataset"] or "unnamed"
        optional["model_name"] = name.rpartition("/")[2]
        optional["eval_results"] = [
            EvalResult(
                task_type="object-detection",
                dataset_name=dataset,
                dataset_type=dataset if _is_repository(dataset) else _slug(dataset),
                metric_type="mean_average_precision",
                metric_name=_METRICS[key],
                metric_value=round(facts.metrics[key], 4),
            )
            for key in measured
        ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="object-detection",
        tags=_unique([*TAGS, *tags]),
        **optional,
    )


def _of_data(part: dict) -> str:
    count = part["num_images"]
    images = "" if count is None else f"{count:,} images"
    data = code_span(part["dataset"]) if part["dataset"] else ""
    return f"{images} of {data}" if images and data else images or data


def _table(head: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> str:
    more = len(rows) - _MOST_ROWS
    lines = [head, *rows[:_MOST_ROWS]]
    if more > 0:
        lines.append((f"and {more:,} more in config.provenance", *[""] * (len(head) - 1)))
    lines = [f"| {' | '.join(escape_markdown(one_line(cell)) for cell in line)} |" for line in lines]
    return "\n".join([lines[0], f"|{' --- |' * len(head)}", *lines[1:]])


def _listed(items: Sequence[str], most: int) -> str:
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more:,} more" if more > 0 else "")


def _place(name: str) -> str:
    """A repository, or only the last part of a path, because paths of a user's machine are private."""
    return name if _is_repository(name) else PurePath(name.replace("\\", "/")).name or name


def _is_repository(name: str) -> bool:
    """Whether this can be a repository of the Hub, and is not a file or folder."""
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name, re.ASCII) is not None
    return is_name and not name.endswith(".json") and not Path(name).exists()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_interval(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


def _unique(tags: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(str(tag) for tag in tags))
