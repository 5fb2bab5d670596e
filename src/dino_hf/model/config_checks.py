"""Checks of a configuration before a model is built: sizes in an untrusted config.json, misspelt names, class names."""

import difflib
import itertools
import math
import operator
import warnings
from collections.abc import Iterable, Iterator, Mapping

from .package_warning import DinoDetrWarning

# Larger values need all memory or take hours. An untrusted config.json can contain any value.
LARGEST = {
    "num_queries": 100_000,
    "d_model": 16_384,
    "encoder_layers": 200,
    "decoder_layers": 200,
    "encoder_ffn_dim": 131_072,
    "decoder_ffn_dim": 131_072,
    "encoder_n_points": 256,
    "decoder_n_points": 256,
    "num_feature_levels": 32,
    "num_denoising": 100_000,
    "num_extra_label_embeddings": 100_000,
    "queries_per_box": 100,
}
CLASS_LOSSES = ("focal", "quality_focal", "align_detr", "stable_dino", "varifocal", "matchability_aware")
MOST_CLASSES = 100_000
_MAX_PARAMETERS = 10**10  # 40 GB in float32
_MAX_LOGITS = 10**8  # for one image and layer, 400 MB in float32

_MAX_BACKBONE_SIZE = 131_072  # limit of any size
_MAX_BACKBONE_LAYERS = 1_000  # in all stages together
_MOST_STAGES = 64
_LARGEST_PATCH, _LARGEST_WINDOW = 1_024, 256
_LARGEST_RATIO = 64
_MAX_SQUARED_WIDTHS = 10**9  # summed over layers; a layer has about twelve times as many parameters
_WIDTHS = ("hidden_size", "hidden_sizes", "embed_dim", "embed_dims", "embedding_size", "intermediate_size", "channels")
_SIZES = ("size", "sizes", "dim", "dims", "heads", "channels", "groups", "stages", "ratio", "ratios", "windows")
_MAX_POSITIONS = 10**9  # numbers in a position embedding

# Settings of similar models that DINO does not have or calls by another name, each with a hint.
_SIBLING_HINTS = {
    "dropout": "DINO is trained without dropout",
    "attention_dropout": "DINO is trained without dropout",
    "activation_dropout": "DINO is trained without dropout",
    "encoder_layerdrop": "DINO is trained without dropout",
    "decoder_layerdrop": "DINO is trained without dropout",
    "two_stage": "DINO always selects its queries from the encoder's tokens",
    "with_box_refine": "DINO always refines boxes from layer to layer",
    "auxiliary_loss": "DINO always has the losses of all layers",
    "aux_loss": "DINO always has the losses of all layers",
    "num_classes": "did you mean num_labels?",
    "nheads": "did you mean encoder_attention_heads and decoder_attention_heads?",
    "hidden_dim": "did you mean d_model?",
    "enc_layers": "did you mean encoder_layers?",
    "dec_layers": "did you mean decoder_layers?",
    "dim_feedforward": "did you mean encoder_ffn_dim and decoder_ffn_dim?",
    "dn_number": "did you mean num_denoising?",
    "dn_box_noise_scale": "did you mean box_noise_scale?",
    "dn_label_noise_ratio": "did you mean label_noise_ratio?",
    "eos_coefficient": "the focal loss has no class for the background",
    "activation_function": "the activation is always ReLU",
    "position_embedding_type": "the embedding is always DINO's sine",
}
# Names that transformers, peft and other libraries put beside the settings.
_LIBRARY_NAMES = {
    *("model_type", "auto_map", "attn_implementation", "name_or_path", "torch_dtype"),
    *("num_labels", "quantization_config", "trust_remote_code", "code_revision", "revision"),
    *("use_cache", "use_bfloat16", "task_specific_params", "custom_pipelines", "experts_implementation"),
    *("pruned_heads", "torchscript", "transformers_weights", "tie_encoder_decoder", "finetuning_task"),
    *("tokenizer_class", "prefix", "generation_config", "peft_config", "base_model_tp_plan"),
    *("base_model_pp_plan", "adapters", "tie_word_embeddings", "is_encoder_decoder"),
}


def warn_of_unknown_names(given: Iterable[str], settings: Iterable[str]) -> None:
    """Warn of each unknown name and suggest the closest setting.

    Args:
        given: names that are not settings.
        settings: names of all settings.
    """
    settings = list(settings)
    for name in given:
        if name in _LIBRARY_NAMES or name.startswith("_"):
            continue
        hint = _SIBLING_HINTS.get(name)
        if hint is None:
            close = difflib.get_close_matches(name, settings, n=1, cutoff=0.7)
            hint = f"did you mean {close[0]}?" if close else "its settings are in the docstring of DinoDetrConfig"
        message = f"{name[:100]!r} is not a setting of DinoDetrConfig and has no effect: {hint}"
        warnings.warn(message.rstrip(".") + ("" if message.endswith("?") else "."), DinoDetrWarning, stacklevel=5)


def is_number(value) -> bool:
    """Whether a value is a finite int or float. True and False are not numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_num_labels(num_labels) -> None:
    """Check the number of classes, before a name is made for each class."""
    if num_labels is None:
        return
    if isinstance(num_labels, bool) or not isinstance(num_labels, int) or not 1 <= num_labels <= MOST_CLASSES:
        raise ValueError(f"num_labels={num_labels!r:.100} must be a whole number in [1, {MOST_CLASSES}].")


def check_sizes(config) -> None:
    """Check the sizes of the transformer, each alone and all together."""
    for name, largest in LARGEST.items():
        if getattr(config, name) > largest:
            raise ValueError(f"{name}={getattr(config, name)} is larger than {largest}, the limit.")
    check_num_labels(len(config.id2label))
    for name, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value} must be a finite number.")
    if (logits := config.num_queries * len(config.id2label)) > _MAX_LOGITS:
        raise ValueError(
            f"num_queries={config.num_queries} and {len(config.id2label)} classes make {logits} logits for each image and layer, "
            f"more than the limit of {_MAX_LOGITS}; use fewer queries."
        )
    if (size := num_parameters(config)) > _MAX_PARAMETERS:
        raise ValueError(
            f"The sizes d_model={config.d_model}, encoder_layers={config.encoder_layers}, decoder_layers={config.decoder_layers}, "
            f"encoder_ffn_dim={config.encoder_ffn_dim}, decoder_ffn_dim={config.decoder_ffn_dim} and others make about {size:.0e} "
            f"parameters, more than the limit of {_MAX_PARAMETERS:.0e}."
        )


def check_loss(config) -> None:
    """Check the settings of the loss and of the noise of denoising queries."""
    if config.class_loss not in CLASS_LOSSES:
        close = difflib.get_close_matches(config.class_loss, CLASS_LOSSES, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"class_loss={config.class_loss[:100]!r} must be one of {', '.join(CLASS_LOSSES)}.{hint}")
    if config.queries_per_box < 1:
        raise ValueError(f"queries_per_box={config.queries_per_box} must be at least 1; Align-DETR has 2.")
    if config.queries_per_box > 1 and config.class_loss != "align_detr":
        raise ValueError(
            f"queries_per_box={config.queries_per_box} needs class_loss='align_detr', which weighs the queries of a box; "
            f"with class_loss={config.class_loss!r}, use 1."
        )
    if not 0 <= config.focal_alpha <= 1:
        raise ValueError(
            f"focal_alpha={config.focal_alpha} must lie in [0, 1]: it is the weight of positives in the loss."
        )
    if not 0 <= config.label_noise_ratio <= 2:
        raise ValueError(
            f"label_noise_ratio={config.label_noise_ratio} must lie in [0, 2]: half of it is the share of random labels."
        )
    for name in ("box_noise_scale", "negative_noise_start"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name}={getattr(config, name)} must not be negative; 0 turns it off.")


def check_thresholds(score_threshold, by_class, id2label: dict[int, str]) -> None:
    """Check the score thresholds of a configuration.

    Args:
        score_threshold: a number in [0, 1] or None.
        by_class: class name -> a number in [0, 1]; or None.
        id2label: the classes of the model.
    Raises:
        ValueError: a threshold is not in [0, 1], or a name is not the name of a class.
    """
    if score_threshold is not None and not _is_score(score_threshold):
        raise ValueError(
            f"score_threshold={score_threshold!r:.100} must be a number in [0, 1], as scores are, or None."
        )
    if by_class is None:
        return
    if not isinstance(by_class, dict):
        raise ValueError(
            f"class_score_thresholds={by_class!r:.100} must be a dictionary from class name to score, such as "
            '{"person": 0.3}, or None.'
        )
    names = set(id2label.values())
    for name, threshold in by_class.items():
        if not isinstance(name, str) or name not in names:
            raise ValueError(
                f"class_score_thresholds has {name!r:.100}, but no class of id2label has this name; remove the entry, or use the "
                "name of a class."
            )
        if not _is_score(threshold):
            raise ValueError(
                f"class_score_thresholds has {threshold!r:.100} for {name!r:.100}; it must be a number in [0, 1], as scores are."
            )


def _is_score(value) -> bool:
    return is_number(value) and 0 <= value <= 1


def num_parameters(config) -> int:
    """Approximate number of parameters of the transformer, without the backbone."""
    width, heads = config.d_model, 1 if config.share_decoder_heads else config.decoder_layers

    def deformable(num_heads: int, num_points: int) -> int:
        return 2 * width**2 + 3 * width * num_heads * config.num_feature_levels * num_points

    encoder = deformable(config.encoder_attention_heads, config.encoder_n_points) + 2 * width * config.encoder_ffn_dim
    decoder = deformable(config.decoder_attention_heads, config.decoder_n_points) + 2 * width * config.decoder_ffn_dim
    rows = config.num_queries + config.num_extra_label_embeddings + len(config.id2label) * (heads + 2)
    levels = 9 * width**2 * max(0, config.num_feature_levels - 3)
    fusion = config.encoder_fusion * (config.encoder_layers + 1) * width**2
    layers = config.encoder_layers * encoder + config.decoder_layers * (decoder + 4 * width**2)
    return layers + rows * width + levels + fusion


def _numbers(value, depth: int = 0) -> Iterator[int | float]:
    """All numbers in nested lists."""
    if isinstance(value, list | tuple) and depth < 4:
        for item in value:
            yield from _numbers(item, depth + 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _is_depth(name: str) -> bool:
    return name.startswith("depth") or name.endswith(("_layers", "_blocks")) or name == "layers"


def _is_width(name: str) -> bool:
    return name.endswith(_WIDTHS)


def check_backbone_sizes(settings: Mapping) -> None:
    """Check the sizes of a backbone's configuration.

    Args:
        settings: the configuration as a dictionary. It is checked before transformers builds an object from it, because the object
            holds a list with a name for each layer.
    Raises:
        ValueError: a size is negative or far too large, or a product of sizes is far too large.
    """
    if isinstance(inner := settings.get("backbone_config"), Mapping):  # of the transformer below a pyramid
        check_backbone_sizes({name: value for name, value in inner.items() if name != "backbone_config"})
    for name, value in settings.items():
        is_depth = _is_depth(name)
        if not (is_depth or name.endswith(_SIZES)):
            continue
        largest = _MAX_BACKBONE_SIZE
        if is_depth:
            largest = _MAX_BACKBONE_LAYERS
        elif name.endswith(("ratio", "ratios")):
            largest = _LARGEST_RATIO
        elif "window" in name:
            largest = _LARGEST_WINDOW
        elif "patch_size" in name or "kernel" in name:
            largest = _LARGEST_PATCH
        elif name.endswith("stages"):
            largest = _MOST_STAGES
        if isinstance(value, list | tuple) and len(value) > _MAX_BACKBONE_LAYERS:
            raise ValueError(f"backbone_config has {name} of {len(value)} entries, more than {_MAX_BACKBONE_LAYERS}.")
        numbers = list(_numbers(value))
        lowest = 0 if is_depth or "window" in name or name.endswith(("ratio", "ratios")) else 1
        for number in numbers:
            if not lowest <= number <= largest:
                raise ValueError(
                    f"backbone_config has {name}={value!r:.100}; allowed are sizes in [{lowest}, {largest}]."
                )
        if is_depth and not sum(numbers) and value is not None:
            raise ValueError(f"backbone_config has {name}={value!r:.100}, so it has no layers.")
        if is_depth and sum(numbers) > _MAX_BACKBONE_LAYERS:
            raise ValueError(
                f"backbone_config has {name}={value!r:.100}, more than {_MAX_BACKBONE_LAYERS} layers together."
            )
    _check_products(settings)


def _check_products(settings: Mapping) -> None:
    depths = [list(_numbers(value)) for name, value in settings.items() if _is_depth(name)]
    widths = [list(_numbers(value)) for name, value in settings.items() if _is_width(name)]
    ratios = [list(_numbers(value)) for name, value in settings.items() if name in ("mlp_ratio", "mlp_ratios")]
    num_layers = max((sum(numbers) for numbers in depths), default=1)
    widest = [max(numbers, default=0) for numbers in widths]
    num_stages = max((len(numbers) for numbers in depths), default=1)
    # Swin doubles its first width from stage to stage.
    doubled = settings.get("embed_dim")
    if isinstance(doubled, int) and 1 < num_stages <= _MOST_STAGES:
        widest.append(doubled * 2 ** (num_stages - 1))
    widest = sorted(widest)[-2:]  # widths of the attention and of the feed-forward block
    squared = widest[0] * widest[-1] if widest else 0
    factor = max((max(numbers, default=1) for numbers in ratios), default=4) / 4
    pairs = [
        sum(depth * width**2 for depth, width in zip(depth_list, width_list, strict=True))
        for depth_list, width_list in itertools.product(depths, widths)
        if len(depth_list) == len(width_list) > 1
    ]
    size = max(1.0, factor) * (max(pairs) if pairs else max(1, num_layers) * squared)
    if size > _MAX_SQUARED_WIDTHS:
        raise ValueError(
            f"backbone_config has {num_layers} layers of widths up to {max(widest, default=0)}: together above the limit. "
            "Its sizes may be damaged."
        )
    sides = list(_numbers(settings.get("image_size")))
    patches = [side for side in _numbers(settings.get("patch_size")) if side] or [16]
    if sides and (max(sides) / min(patches)) ** 2 * max([1, *widest]) > _MAX_POSITIONS:
        raise ValueError(
            f"backbone_config has image_size={settings['image_size']!r:.100} and patch_size={patches[0]}: "
            "more positions than the limit."
        )


def checked_names(id2label: dict[int, str]) -> dict[int, str]:
    """Check class names and return them ordered by class index. Keys may be strings, as JSON makes them.

    Raises:
        ValueError: `id2label` is no dictionary, the classes are not numbered 0 to K - 1, or a name is no string.
    """
    if not isinstance(id2label, dict):
        raise ValueError(
            f"id2label is a {type(id2label).__name__}, but must be a dictionary from class index to name; "
            "dict(enumerate(names)) makes one of a list of names."
        )
    try:
        names = {int(index): name for index, name in id2label.items()}
    except (TypeError, ValueError):
        raise ValueError(
            f"id2label has the keys {list(id2label)[:10]}, but must be a dictionary from class index to name; the other way "
            "around it is label2id."
        ) from None
    if sorted(names) != list(range(len(id2label))) or not names:
        raise ValueError(
            f"id2label has the keys {sorted(names)[:10]}, but the classes of a model are numbered 0 to K - 1; category ids "
            "with gaps are mapped by dino_hf.training.load_coco."
        )
    if others := [name for name in names.values() if not isinstance(name, str)]:
        raise ValueError(f"id2label has the names {others[:10]}, but names must be strings.")
    return dict(sorted(names.items()))


def checked_category_ids(category_ids: list[int] | None, id2label: dict[int, str]) -> list[int] | None:
    """Check category ids and return them as a list of int. Each class needs its own whole number."""
    if category_ids is None:
        return None
    if len(category_ids) != len(id2label):
        raise ValueError(
            f"category_ids has {len(category_ids)} entries for {len(id2label)} classes; give one for each, in the order of "
            "id2label, or None."
        )
    try:
        category_ids = [operator.index(category_id) for category_id in category_ids]  # also NumPy's
    except TypeError:
        raise ValueError(f"category_ids={category_ids} must be whole numbers.") from None
    if largest := [category_id for category_id in category_ids if not -(2**63) <= category_id < 2**63]:
        raise ValueError(f"category_ids has {largest[0]!r:.30}, but an id has at most 63 bits.")
    if len(set(category_ids)) < len(category_ids):
        raise ValueError(f"category_ids={category_ids} has one id twice; each class needs its own id.")
    return category_ids


def invert_names(label2id: dict[str, int]) -> dict[int, str]:
    """`label2id` -> `id2label`."""
    if not isinstance(label2id, dict):
        raise ValueError(
            f"label2id is a {type(label2id).__name__}, but must be a dictionary from name to class index; id2label is enough."
        )
    return {index: name for name, index in label2id.items()}


def requested_names(
    id2label: dict | None, label2id: dict | None, num_labels: int | None, saved: dict[int, str]
) -> dict[int, str]:
    """Class names given in one of three ways when a configuration is loaded, or `saved` if none is given."""
    if id2label is not None:
        names = checked_names(id2label)
    elif label2id is not None:
        names = checked_names(invert_names(label2id))
    elif num_labels in (None, len(saved)):
        return saved
    else:
        return {index: f"LABEL_{index}" for index in range(num_labels)}  # as in the library
    if num_labels not in (None, len(names)):
        raise ValueError(
            f"num_labels={num_labels}, but there are names for {len(names)} classes; leave num_labels out."
        )
    return names
