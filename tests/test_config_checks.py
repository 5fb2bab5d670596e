"""What a stranger's config.json may ask for, names that are no settings, and the stages of backbones."""

import json
import time
import warnings

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_BACKBONE_MAPPING_NAMES

from dino_hf import DinoDetrConfig
from dino_hf.model.config_checks import check_backbone_sizes, num_parameters
from dino_hf.model.package_warning import DinoDetrWarning
from helpers import RESNET, SWIN, tiny_config

NAN, INFINITY = float("nan"), float("inf")
DINOV2 = {"model_type": "dinov2"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_model": 16_384, "encoder_ffn_dim": 131_072, "encoder_layers": 200}, "make about .* parameters, more than"),
        ({"num_labels": 10**9}, "num_labels=1000000000 must be a whole number in"),
        ({"num_labels": -1}, "num_labels=-1 must be"),
        ({"num_labels": 0}, "num_labels=0 must be"),
        ({"num_labels": True}, "num_labels=True must be"),
        ({"num_queries": 100_000, "num_labels": 1_001}, "make 100100000 logits"),
        ({"class_cost": NAN}, "class_cost=nan must be a finite number"),
        ({"giou_loss_coefficient": INFINITY}, "giou_loss_coefficient=inf must be a finite number"),
        ({"position_offset": -INFINITY}, "position_offset=-inf must be a finite number"),
        ({"category_ids": [1, 2, 3, 4, 10**400]}, "an id has at most 63 bits"),
        ({"score_threshold": 1.5}, r"score_threshold=1.5 must be a number in \[0, 1\]"),
        ({"score_threshold": NAN}, "score_threshold=nan must be a"),
        ({"score_threshold": "high"}, "score_threshold"),
        ({"class_score_thresholds": ["LABEL_0"]}, "class_score_thresholds"),
        (
            {"class_score_thresholds": {"no class": 0.3}},
            "class_score_thresholds has 'no class', but no class of id2label",
        ),
        ({"class_score_thresholds": {3: 0.3}}, "class_score_thresholds has 3, but no class"),
        ({"class_score_thresholds": {"LABEL_0": -0.1}}, "class_score_thresholds has -0.1 for 'LABEL_0'"),
        ({"class_score_thresholds": {"LABEL_0": True}}, "class_score_thresholds has True for 'LABEL_0'"),
        ({"class_score_thresholds": {"LABEL_0": [0.5]}}, r"class_score_thresholds has \[0.5\] for 'LABEL_0'"),
        ({"class_score_thresholds": {"x" * 10**3: 0.1}}, "class_score_thresholds has 'xxx"),
        (
            {"backbone_config": DINOV2 | {"num_hidden_layers": 10**9}},
            r"num_hidden_layers=1000000000; allowed are sizes",
        ),
        (
            {"backbone_config": DINOV2 | {"num_hidden_layers": 1000, "hidden_size": 131_072}},
            "1000 layers of widths up to",
        ),
        ({"backbone_config": DINOV2 | {"image_size": 131_072, "patch_size": 1}}, "more positions than the limit"),
        ({"backbone_config": DINOV2 | {"patch_size": 0}}, r"patch_size=0; allowed are sizes in \[1, 1024\]"),
        ({"backbone_config": DINOV2 | {"num_attention_heads": 0}}, "num_attention_heads=0; allowed are sizes"),
        ({"backbone_config": DINOV2 | {"hidden_size": NAN}}, "hidden_size=nan; allowed are sizes"),
        ({"backbone_config": SWIN | {"embed_dim": 131_072}}, "widths up to"),
        ({"backbone_config": SWIN | {"mlp_ratio": 1e9}}, "mlp_ratio=1000000000.0; allowed are sizes"),
        ({"backbone_config": SWIN | {"window_size": 10**5}}, "window_size=100000; allowed are sizes"),
        ({"backbone_config": SWIN | {"depths": [500, 500, 500, 500]}}, "more than 1000 layers together"),
        ({"backbone_config": SWIN | {"depths": [1] * 10**6}}, "depths of 1000000 entries"),
        ({"backbone_config": RESNET | {"hidden_sizes": [131_072] * 4}}, "widths up to 131072"),
        ({"backbone_config": RESNET | {"depths": []}}, r"depths=\[\], so it has no layers"),
    ],
    ids=str,
)
def test_sizes_that_are_absurd_alone_or_together_are_refused_at_once(changes, message):
    start = time.perf_counter()
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        tiny_config(**changes)
    assert time.perf_counter() - start < 1  # milliseconds, on a machine that has time


def test_a_folder_with_too_many_labels_is_refused(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match="num_labels=1000000000 must be"):
        DinoDetrConfig.from_pretrained(tmp_path, num_labels=10**9)
    del saved["id2label"], saved["label2id"]
    (tmp_path / "config.json").write_text(json.dumps(saved | {"num_labels": 10**9}))
    with pytest.raises(ValueError, match="num_labels=1000000000 must be"):
        DinoDetrConfig.from_pretrained(tmp_path)


def test_the_estimate_of_parameters_is_about_right():
    from dino_hf import DinoDetrModel

    for config in (tiny_config(), tiny_config(d_model=128, num_queries=300, share_decoder_heads=False)):
        model = DinoDetrModel(config)
        size = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.backbone.model.parameters())
        assert 0.7 < num_parameters(config) / size < 1.3


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_BACKBONE_MAPPING_NAMES))
def test_no_backbone_of_the_library_is_refused_for_its_sizes(model_type):
    check_backbone_sizes(CONFIG_MAPPING[model_type]().to_dict())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("num_querys", "did you mean num_queries?"),
        ("decoder_layer", "did you mean decoder_layers?"),
        ("backbone_confg", "did you mean backbone_config?"),
        ("dropout", "DINO is trained without dropout."),
        ("two_stage", "DINO always selects its queries"),
        ("num_classes", "did you mean num_labels?"),
        ("colour", "its settings are in the docstring of DinoDetrConfig."),
    ],
)
def test_a_name_that_is_no_setting_is_told_with_a_hint(name, hint):
    with pytest.warns(DinoDetrWarning) as told:
        tiny_config(**{name: 3})
    assert f"'{name}' is not a setting of DinoDetrConfig and has no effect: {hint}" in str(told[0].message)


def test_names_of_the_library_and_of_subclasses_are_no_mistakes(tmp_path):
    class Mine(DinoDetrConfig):
        colour: str = "red"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tiny_config(name_or_path="x", torch_dtype="float32", output_attentions=True, _commit_hash="1").save_pretrained(
            tmp_path
        )
        DinoDetrConfig.from_pretrained(tmp_path, attn_implementation="eager", hidden_size=64)
        assert Mine(colour="blue").colour == "blue"
