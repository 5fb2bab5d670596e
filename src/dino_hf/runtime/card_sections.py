"""The text and the metadata of a model card, from its data."""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..common.text import code_span, escape_markdown, list_some, one_line
from ..model.coco_classes import coco_class_space
from .card_data import CardData, Conversion, Evaluated, OldClassScores, Scores

TAGS = ("object-detection", "vision", "dino_detr", "dino", "detr")
_PROJECTS = {
    "original": "the original release (https://github.com/IDEA-Research/DINO)",
    "detrex": "detrex (https://github.com/IDEA-Research/detrex)",
    "mmdet": "MMDetection (https://github.com/open-mmlab/mmdetection)",
    "aligndetr": "Align-DETR (https://github.com/FelixCaae/AlignDETR)",
    "stabledino": "Stable-DINO (https://github.com/IDEA-Research/Stable-DINO)",
    "codetr": "Co-DETR (https://github.com/Sense-X/Co-DETR)",
    "codetr_mmdet": "Co-DETR in MMDetection (https://github.com/open-mmlab/mmdetection/tree/main/projects/CO-DETR)",
}
_BACKBONES = {
    "resnet": "ResNet",
    "swin": "Swin",
    "convnext": "ConvNeXt",
    "bit": "BiT",
    "dino_detr_focalnet": "FocalNet",
    "dino_detr_internimage": "InternImage",
    "timm_backbone": "timm",
}
_METRICS = {
    "AP": "AP, mean over IoU 0.50 to 0.95",
    "AP50": "AP at IoU 0.50",
    "AP75": "AP at IoU 0.75",
    **{f"AP_{size}": f"AP of {size} objects" for size in ("small", "medium", "large")},
    "AR_1": "AR with 1 detection per image",
    "AR_10": "AR with 10 detections per image",
    "AR_100": "AR with 100 detections per image",
    **{f"AR_{size}": f"AR of {size} objects" for size in ("small", "medium", "large")},
}
_OF_CLASS = "AP_class_"
_MAX_CLASSES = 400  # in the list of classes
_MAX_ROWS = 400  # rows of a table
_MAX_NAMES = 50  # in a sentence
_THRESHOLD = 0.4  # threshold in the example, if the best threshold is unknown
_URL = re.compile(r"https?://[\w.~:/?#@!$&'()*+,;=%-]+", re.ASCII)  # no character that ends a link or starts HTML


def card_body(data: CardData, config, num_parameters: int, name: str, folder: Path | None, has_code: bool) -> str:
    """The text of a card below its metadata.

    Args:
        config: `DinoDetrConfig`.
        name: folder or repository that the code in the card loads.
        folder: where the card will be.
        has_code: whether the code of the model is saved beside the card.
    """
    backbone = escape_markdown(one_line(_backbone(config)))
    sections = [
        f"# DINO object detector: {backbone}, {config.num_feature_levels} scales",
        "DINO (DETR with Improved deNoising anchOr boxes, [arXiv:2203.03605](https://arxiv.org/abs/2203.03605)) for Transformers, "
        "implemented by dino_hf. This is the object detector, not the self-supervised DINO.",
        "## Weights",
        _weights(data),
        *_training(data, folder),
        "## Classes",
        _classes(config),
        "## Use",
        *_use(name, data, has_code),
        "## Architecture",
        _table(("", ""), _architecture(config, num_parameters)),
        "## Licence",
        f"Weights: {escape_markdown(data.license)}." if data.license else "No licence of the weights is recorded.",
    ]
    if has_code:
        sections[-1] += " The Python files in this repository are part of dino_hf (Apache-2.0)."
    if data.unread:
        left_out = list_some(data.unread, _MAX_NAMES)
        sections.append(f"These entries of `config.provenance` could not be read and are left out: {left_out}.")
    return "\n\n".join(sections)


def _weights(data: CardData) -> str:
    conversion, base = data.converted_from, code_span(_short_name(data.base_model)) if data.base_model else ""
    sentences = [] if conversion is None else _conversion(conversion, data)
    if data.training is None:
        if base:
            sentences.append(f"The record says that they were made from {base}.")
        if data.start and not sentences:
            sentences.append(f"The weights are not trained. They are {escape_markdown(data.start)}.")
        return " ".join(sentences) or "There is no record of where the weights come from. They may be random."
    start = base or (
        "the converted weights" if conversion else escape_markdown(data.start or "weights without a record")
    )
    images = _images(data.training)
    sentences.append(f"The weights here were trained{f' on {images}' if images else ''}, starting from {start}.")
    if data.training.selected:
        sentences.append(f"They are {escape_markdown(data.training.selected)}.")
    return " ".join(sentences)


def _conversion(conversion: Conversion, data: CardData) -> list[str]:
    is_trained = data.training is not None
    is_changed = not is_trained and data.are_changed
    file = f"the file {code_span(conversion.file)}" if conversion.file else "a file"
    sha256 = f" (sha256 {code_span(conversion.sha256)})" if conversion.sha256 else ""
    project = _PROJECTS.get(conversion.project) or escape_markdown(conversion.project or "")
    subject = "The weights that training started from" if is_trained else "The weights"
    sentences = [f"{subject} were converted from {file}{sha256}{f' of {project}' if project else ''}."]
    if is_changed:
        sentences.append("The weights here were changed after the conversion, and no record says how.")
    if conversion.published:
        sentences.append(f"That file is the checkpoint published as {escape_markdown(conversion.published)}.")
    if conversion.url:
        is_address = _URL.fullmatch(conversion.url)
        sentences.append(f"Source: {f'<{conversion.url}>' if is_address else code_span(conversion.url)}.")
    if conversion.published_ap is not None:
        data_set = f" on {escape_markdown(conversion.published_ap_data)}" if conversion.published_ap_data else ""
        sentences.append(
            f"**Published AP{data_set}: {conversion.published_ap}**, reported by its authors and not measured by us."
        )
        if is_trained or is_changed:
            sentences.append("It belongs to that file and not to the weights here.")
    if conversion.assumed:
        settings = list_some([code_span(f"{key}={value}") for key, value in conversion.assumed.items()], _MAX_NAMES)
        sentences.append(f"The file does not hold all settings. These were assumed: {settings}.")
    return sentences


def _training(data: CardData, folder: Path | None) -> list[str]:
    if data.training is None:
        return []
    sections, steps, evaluation = [], data.training.steps, data.evaluation
    rows = [(str(key).replace("_", " "), value) for key, value in data.training.recipe.items() if value is not None]
    if steps is not None:
        rows.append(("optimizer steps", f"{steps:,}"))
    if rows:
        sections += ["## Training", _table(("setting", "value"), rows)]
    sections.append("## Evaluation")
    if not evaluation.metrics:
        return [*sections, "No AP of these weights was recorded."]
    images = _images(evaluation)
    when = "after training" if evaluation.after_training else "in training"
    sections.append(f"Measured {when}{f', on {images}' if images else ''}.")
    if not data.is_measured:
        measured, now = ("an unknown step" if step is None else f"step {step:,}" for step in (evaluation.step, steps))
        if measured != now:
            sections[-1] += f" It was measured at {measured}; these weights are from {now}."
        else:
            sections[-1] += " The weights were changed since then, and no record says how."
        sections[-1] += " AP was not measured with these weights."
    return [*sections, *_scores(evaluation), *(_pictures(evaluation, folder) if data.is_measured else [])]


def _recall_label(key: str) -> str:
    """The label of AR_<number of detections>. Other keys are their own label."""
    number = key.removeprefix("AR_")
    return f"AR with {number} detections per image" if number != key and number.isdecimal() else key


def _scores(evaluation: Evaluated) -> list[str]:
    """Tables of metrics, and sentences on the threshold and the test images."""
    sections, metrics, intervals = [], evaluation.metrics, evaluation.intervals
    of_class = [key for key in metrics if key.startswith(_OF_CLASS)]
    known = [key for key in _METRICS if key in metrics]  # JSON may have changed their order
    labels = {key: _METRICS.get(key) or _recall_label(key) for key in [*known, *metrics] if key not in of_class}
    if not evaluation.objects:  # otherwise the classes have their own table
        labels |= {key: f"AP of {key.removeprefix(_OF_CLASS)}" for key in of_class}
    rows = [(label, f"{metrics[key]:.3f}", _interval(intervals, key)) for key, label in labels.items()]
    if intervals:
        sections += ["Intervals are 95 % bootstrap intervals over the images.", _table(("", "value", "interval"), rows)]
    else:
        sections.append(_table(("", "value"), [row[:2] for row in rows]))
    best = evaluation.best
    if {"threshold", "f1", "precision", "recall"} <= best.keys():
        sections.append(
            f"**Best threshold: {best['threshold']:.2f}**. There, F1 over all classes is highest: {best['f1']:.3f}, with precision "
            f"{best['precision']:.3f} and recall {best['recall']:.3f} at IoU 0.50."
        )
    if (test := evaluation.test) is not None and "AP" in test.metrics:
        interval = _interval(test.intervals, "AP")
        sections.append(
            f"On {_images(test) or 'test images'}, which were not used to choose anything: **AP {test.metrics['AP']:.3f}**"
            + (f" ({interval})." if interval else ".")
        )
    if evaluation.objects:
        rows = []
        for name, count in evaluation.objects.items():
            ap = metrics.get(_OF_CLASS + name)
            rows.append((name, count, "" if ap is None else f"{ap:.3f}", _interval(intervals, _OF_CLASS + name)))
        sections.append(_table(("class", "objects", "AP", "interval"), rows))
    if (old := evaluation.old_classes) is not None:
        sections += _old_classes(old)
    return sections


def _old_classes(old: OldClassScores) -> list[str]:
    """Scores of the classes that the training data do not annotate."""
    heading, images = "### Classes kept from before training", _images(old)
    if "AP" not in old.metrics:
        return [heading, "The training data do not annotate these classes, and they were not measured."]
    names = [key.removeprefix(_OF_CLASS) for key in old.metrics if key.startswith(_OF_CLASS)]
    if old.is_agreement:
        text = (
            f"The training data do not annotate these classes. On {images}, detections of the detector before training serve as "
            f"ground truth: **agreement {old.metrics['AP']:.3f}**. It is not an AP on annotations, because the old detector makes "
            "mistakes too."
        )
        rows = [(name, f"{old.metrics[_OF_CLASS + name]:.3f}") for name in names]
        return [heading, text, _table(("class", "agreement"), rows)]
    before = {name: f"{value:.3f}" for name, value in old.before.items()}
    text = (
        f"The training data do not annotate these classes. On {images}, which are annotated with them: **AP "
        f"{old.metrics['AP']:.3f}**" + (f"; before training {before['AP']}." if "AP" in before else ".")
    )
    rows = [(name, f"{old.metrics[_OF_CLASS + name]:.3f}", before.get(_OF_CLASS + name, "")) for name in names]
    return [heading, text, _table(("class", "AP", "AP before training"), rows)]


def _interval(intervals: dict[str, list[float]], key: str) -> str:
    return "{:.3f} to {:.3f}".format(*intervals[key]) if key in intervals else ""


def _pictures(evaluation: Evaluated, folder: Path | None) -> list[str]:
    """The recorded pictures that are in the folder of the card."""
    if folder is None:
        return []
    return [
        f"![{escape_markdown(caption.replace('[', '(').replace(']', ')'))}]({name})"
        for name, caption in evaluation.pictures.items()
        if re.fullmatch(r"[\w-]+\.png", name) and (folder / name).is_file()
    ]


def _classes(config) -> str:
    names, ids = dict(config.id2label), config.category_ids
    coco = coco_class_space(len(names))
    if all(name == f"LABEL_{index}" for index, name in names.items()):
        return f"{len(names)} classes, whose names were not recorded."
    if coco is None or names != coco[0]:
        text = f"{len(names)} classes."
        if ids is not None and ids != list(names):
            text += " A number in parentheses is the category id in the training annotations (`config.category_ids`)."
    elif len(names) == 91:
        text = '91 outputs for the 80 categories of COCO. The class index is the raw COCO category id. Unused ids are called "N/A".'
    else:
        text = "The 80 categories of COCO, ordered by their ids."
        if ids == coco[1]:
            text += " A number in parentheses is the COCO id (`config.category_ids`)."
    indices = [index for index, name in names.items() if name != "N/A"]
    listed = [
        escape_markdown(one_line(names[index]))
        + (f" ({ids[index]})" if ids is not None and ids[index] != index else "")
        for index in indices[:_MAX_CLASSES]
    ]
    more = len(indices) - len(listed)
    return f"{text}\n\n{', '.join(listed)}{f', and {more} more in `config.id2label`' if more > 0 else ''}"


def _use(name: str, data: CardData, has_code: bool) -> list[str]:
    threshold = data.evaluation.best.get("threshold", _THRESHOLD) if data.is_measured else _THRESHOLD
    model = json.dumps(one_line(name, 1000).replace("`", "'"), ensure_ascii=False)  # a name must not end the code
    call = (
        f'detector("street.jpg", threshold={round(threshold, 2)})'
        '  # [{"score": ..., "label": ..., "box": {"xmin": ..., ...}}, ...]'
    )
    load = f'from transformers import pipeline\n\ndetector = pipeline("object-detection", model={model}'
    sections = [
        "With dino_hf installed, which brings fast kernels:",
        f"```python\nimport dino_hf\n{load})\n{call}\n```",
    ]
    if has_code:
        sections += [
            "Without dino_hf, the Python files in this repository are used. Training then needs scipy. Transformers logs that the "
            'model "is not supported for object-detection". This is harmless.',
            f"```python\n{load}, trust_remote_code=True)\n{call}\n```",
        ]
    return sections


def _architecture(config, num_parameters: int) -> list[tuple[str, Any]]:
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
    if backbone.model_type == "dino_detr_vit_pyramid":
        inner = backbone.backbone_config
        return f"{inner.model_type} of {inner.num_hidden_layers} layers with a feature pyramid"
    depths = getattr(backbone, "depths", None)
    return f"{kind} of depths {'-'.join(map(str, depths))}" if depths else kind


def card_metadata(data: CardData, name: str, tags: Sequence[str]) -> ModelCardData:
    """Metadata as the Hub reads them. Results are included only if they were measured on the weights of the card."""
    optional = {}
    if data.license:
        identifier = data.license.lower()
        is_identifier = re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", identifier)
        optional |= {"license": identifier} if is_identifier else {"license": "other", "license_name": data.license}
    published = data.converted_from and data.converted_from.published  # looks like a repository, but is none
    if data.base_model and _is_repository(data.base_model) and data.base_model != published:
        optional["base_model"] = data.base_model
    if data.training is not None and (dataset := data.training.dataset) and _is_repository(dataset):
        optional["datasets"] = [dataset]
    metrics = data.evaluation.metrics
    if data.is_measured and (measured := [key for key in ("AP", "AP50", "AP75") if key in metrics]):
        dataset = data.evaluation.dataset or "unnamed"
        slug = re.sub(r"[^a-z0-9]+", "-", dataset.lower()).strip("-") or "unnamed"
        optional["model_name"] = name.rpartition("/")[2]
        optional["eval_results"] = [
            EvalResult(
                task_type="object-detection",
                dataset_name=dataset,
                dataset_type=dataset if _is_repository(dataset) else slug,
                metric_type="mean_average_precision",
                metric_name=_METRICS[key],
                metric_value=round(metrics[key], 4),
            )
            for key in measured
        ]
    return ModelCardData(
        library_name="transformers", pipeline_tag="object-detection", tags=unique([*TAGS, *tags]), **optional
    )


def _images(scores: Scores | Any) -> str:
    """Number of images and name of a data set, as far as they are known."""
    images = "" if scores.num_images is None else f"{scores.num_images:,} images"
    data = code_span(scores.dataset) if scores.dataset else ""
    return f"{images} of {data}" if images and data else images or data


def _table(head: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> str:
    more = len(rows) - _MAX_ROWS
    lines = [head, *rows[:_MAX_ROWS]]
    if more > 0:
        lines.append((f"and {more:,} more in config.provenance", *[""] * (len(head) - 1)))
    lines = [f"| {' | '.join(escape_markdown(one_line(cell)) for cell in line)} |" for line in lines]
    return "\n".join([lines[0], f"|{' --- |' * len(head)}", *lines[1:]])


def _short_name(name: str) -> str:
    """The name of a repository, or the last part of a path: paths of a user's machine are private."""
    return name if _is_repository(name) else PurePath(name.replace("\\", "/")).name or name


def _is_repository(name: str) -> bool:
    """Whether this can be a repository of the Hub and is not a file or folder here."""
    is_name = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name, re.ASCII) is not None
    return is_name and not name.endswith(".json") and not Path(name).exists()


def unique(tags: Sequence[str]) -> list[str]:
    """The tags without repetitions, in their order."""
    return list(dict.fromkeys(str(tag) for tag in tags))
