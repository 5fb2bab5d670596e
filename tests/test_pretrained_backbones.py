"""Backbones by name: from folders of transformers and of timm, and from a Hub that does not answer."""

import json
import logging
from urllib.error import URLError

import pytest
import torch
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    BitConfig,
    BitForImageClassification,
    BitImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    FocalNetConfig,
    FocalNetForImageClassification,
    ResNetBackbone,
    ResNetConfig,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

import dino_hf
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common import hub_access
from dino_hf.model.package_warning import DinoDetrWarning
from dino_hf.runtime import pretrained_backbones
from dino_hf.runtime.pretrained_backbones import load_pretrained_backbone, pixel_settings
from helpers import BIT, CONVNEXT, RESNET, SWIN, VIT_PYRAMID, randomize, tiny_config, tiny_images

SETTINGS = {
    name: getattr(tiny_config(), name)
    for name in ("d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim", "num_queries")
}
PLAIN = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 64}


def plain(settings: dict) -> dict:
    return {name: value for name, value in settings.items() if name != "model_type"}


CLASSIFIERS = {
    "swin": lambda: SwinForImageClassification(SwinConfig(**plain(SWIN))),
    "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(**plain(CONVNEXT))),
    "bit": lambda: BitForImageClassification(BitConfig(**plain(BIT))),
    "focalnet": lambda: FocalNetForImageClassification(
        FocalNetConfig(depths=[1] * 4, embed_dim=8, hidden_sizes=[16, 32, 64, 64])
    ),
}


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_a_classifier_in_a_folder_gives_its_weights_and_the_maps_of_a_detector(kind, tmp_path):
    classifier = randomize(CLASSIFIERS[kind](), scale=0.1).eval()
    classifier.save_pretrained(tmp_path)
    model = DinoDetrForObjectDetection.from_backbone(tmp_path, num_labels=3, **SETTINGS).eval()
    stages = ["stage1", "stage2", "stage4"] if kind == "focalnet" else ["stage2", "stage3", "stage4"]
    assert model.config.backbone_config.out_features == stages
    assert model.config.num_labels == 3
    published = {name.removeprefix(f"{kind}."): value for name, value in classifier.state_dict().items()}
    published |= classifier.state_dict()  # SwinBackbone keeps the prefix
    found = model.model.backbone.model.state_dict()
    new = {name for name in found if name not in published}
    assert len(set(found) - new) > 10
    assert all("hidden_states_norms" in name for name in new)
    assert all(torch.equal(found[name], published[name]) for name in set(found) - new)
    assert all(torch.equal(found[name], torch.ones_like(found[name]) * name.endswith("weight")) for name in new)
    assert model(*tiny_images()).logits.isfinite().all()
    model.save_pretrained(tmp_path / "detector")
    again = DinoDetrForObjectDetection.from_pretrained(tmp_path / "detector").model.backbone.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.model.backbone.state_dict().items())


def test_a_saved_backbone_keeps_the_maps_it_names_and_the_user_can_name_others(tmp_path):
    ResNetBackbone(ResNetConfig(**plain(RESNET), out_features=["stage3", "stage4"])).save_pretrained(tmp_path)
    assert load_pretrained_backbone(tmp_path).config.out_features == ["stage3", "stage4"]
    assert load_pretrained_backbone(tmp_path, out_features=["stage2"]).config.out_features == ["stage2"]
    assert load_pretrained_backbone(tmp_path, out_indices=(1, 4)).config.out_features == ["stage1", "stage4"]


@pytest.mark.parametrize("maps", [{"out_features": ["stage4"]}, {"out_indices": [4]}, {"out_indices": [-1]}], ids=str)
def test_the_last_map_alone_is_used_if_the_user_names_it(maps, tmp_path):
    ResNetBackbone(ResNetConfig(**plain(RESNET))).save_pretrained(tmp_path / "backbone")
    with pytest.warns(DinoDetrWarning, match="one map, too coarse"):
        model = DinoDetrForObjectDetection.from_backbone(tmp_path / "backbone", **maps, **SETTINGS)
    assert model.config.backbone_config.out_features == ["stage4"]
    assert any(parameter.requires_grad for parameter in model.model.backbone.model.parameters())
    model.save_pretrained(tmp_path / "detector")
    with pytest.warns(DinoDetrWarning, match="one map, too coarse"):
        again = DinoDetrForObjectDetection.from_pretrained(tmp_path / "detector")
    assert again.config.backbone_config.out_features == ["stage4"]
    assert again(*tiny_images()).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["beit", "dinov2", "dinov3_vit", "vitdet"])
def test_a_plain_transformer_gets_a_pyramid_unless_a_map_is_named(kind, tmp_path):
    settings = PLAIN | ({"image_size": 64, "patch_size": 16} if kind == "beit" else {})
    published = randomize(AutoModel.from_config(AutoConfig.for_model(kind, **settings)), scale=0.1)
    published.save_pretrained(tmp_path)
    model = DinoDetrForObjectDetection.from_backbone(tmp_path, **SETTINGS).eval()
    config = model.config.backbone_config
    assert (config.model_type, config.backbone_config.model_type) == ("dino_detr_vit_pyramid", kind)
    assert config.out_features == ["stage1", "stage2", "stage3", "stage4"]
    loaded = model.model.backbone.model.backbone.state_dict()
    values = [tensor for tensor in published.state_dict().values() if tensor.dim() == 2]
    assert len(values) > 4
    found = [any(one.shape == value.shape and torch.equal(one, value) for one in loaded.values()) for value in values]
    assert sum(found) >= len(values) - 2  # a pooler is left out
    assert model(*tiny_images()).logits.isfinite().all()
    model.save_pretrained(tmp_path / "detector")
    again = DinoDetrForObjectDetection.from_pretrained(tmp_path / "detector").model.backbone.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.model.backbone.state_dict().items())
    named = DinoDetrForObjectDetection.from_backbone(str(tmp_path), out_features=["stage3"], **SETTINGS)
    assert named.config.backbone_config.model_type == kind
    assert named.config.backbone_config.out_features == ["stage3"]


def test_a_saved_own_backbone_is_found_by_its_folder(tmp_path):
    settings = dict(VIT_PYRAMID)
    backbone = randomize(AutoBackbone.from_config(AutoConfig.for_model(**settings)), scale=0.1)
    backbone.save_pretrained(tmp_path)
    model = DinoDetrForObjectDetection.from_backbone(tmp_path, **SETTINGS)
    loaded = model.model.backbone.model.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in backbone.state_dict().items())


def test_what_is_no_backbone_is_refused(tmp_path):
    ViTForImageClassification(ViTConfig(**PLAIN)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match="type 'vit', which is no backbone"):
        load_pretrained_backbone(tmp_path / "vit")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty has no readable backbone"):
        load_pretrained_backbone(tmp_path / "empty")
    ResNetBackbone(ResNetConfig(**plain(RESNET))).save_pretrained(tmp_path / "partial")
    from safetensors.torch import load_file, save_file

    weights = load_file(tmp_path / "partial" / "model.safetensors")
    dropped = next(name for name in weights if name.endswith("convolution.weight"))
    weights.pop(dropped)
    save_file(weights, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 weights of a ResNetBackbone, for example {dropped}"):
        load_pretrained_backbone(tmp_path / "partial")


@pytest.mark.parametrize("name", ["", " ", None, 5])
def test_a_name_that_is_empty_or_no_text_is_refused(name):
    with pytest.raises(ValueError, match=rf"The name of a backbone is {name!r}; give a folder"):
        DinoDetrForObjectDetection.from_backbone(name)


@pytest.mark.parametrize("name", ["someone/nothing", "nothing-of-this-name"])
def test_a_hub_that_does_not_answer_is_asked_once_and_quickly(name, monkeypatch):
    asked = []

    def fail(request, timeout):
        asked.append(timeout)
        raise URLError("Name or service not known")

    monkeypatch.setattr(hub_access, "urlopen", fail)
    monkeypatch.setattr(hub_access, "is_offline_mode", lambda: False)
    with pytest.raises(OSError, match=rf"^There is no folder {name}, and the Hub gives no backbone.*ConnectionError"):
        DinoDetrForObjectDetection.from_backbone(name)
    assert asked == [10]


@pytest.mark.parametrize("name", ["someone/nothing", "nothing-of-this-name"])
def test_without_an_answer_of_the_hub_there_is_one_sentence(name, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("We couldn't connect to the Hub")

    monkeypatch.setattr(pretrained_backbones.PreTrainedConfig, "get_config_dict", fail)
    monkeypatch.setattr(pretrained_backbones.AutoConfig, "from_pretrained", fail)
    with pytest.raises(OSError, match=rf"^There is no folder {name}, and the Hub gives no backbone") as raised:
        DinoDetrForObjectDetection.from_backbone(name)
    assert "\n" not in str(raised.value)


def test_the_pixels_of_the_backbones_training_are_used(tmp_path):
    ResNetBackbone(ResNetConfig(**plain(RESNET))).save_pretrained(tmp_path)
    with pytest.warns(DinoDetrWarning, match="has no readable preprocessor_config.json"):
        assert pixel_settings(tmp_path) == {}
    BitImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4]).save_pretrained(tmp_path)
    processor = DinoDetrImageProcessor.from_backbone(str(tmp_path), size={"shortest_edge": 64, "longest_edge": 96})
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    assert processor.size == {"shortest_edge": 64, "longest_edge": 96}
    image = torch.full((3, 48, 60), 255, dtype=torch.uint8)
    pixels = processor(image, return_tensors="pt")["pixel_values"][0, :, 10, 10]
    torch.testing.assert_close(pixels, torch.tensor([2.5, 2.0, 1.75]))
    assert list(DinoDetrImageProcessor.from_backbone(str(tmp_path), image_mean=[0.1] * 3).image_mean) == [0.1] * 3


def test_the_librarys_report_of_unused_weights_is_not_shown(tmp_path, caplog):
    CLASSIFIERS["convnext"]().save_pretrained(tmp_path)
    logging.getLogger("transformers").propagate = True
    load_pretrained_backbone(tmp_path)
    assert "UNEXPECTED" not in caplog.text


def test_remote_code_says_that_the_package_is_needed(monkeypatch):
    """Code from the Hub has no functions of the package."""
    monkeypatch.setattr(DinoDetrForObjectDetection, "backbone_loader", None)
    monkeypatch.setattr(DinoDetrImageProcessor, "pixel_reader", None)
    for owner in (DinoDetrForObjectDetection, DinoDetrImageProcessor):
        with pytest.raises(ImportError, match="pip install dino_hf"):
            owner.from_backbone("microsoft/resnet-50")


class TestTimm:
    @pytest.fixture
    def folder(self, tmp_path):
        """timm's resnet18 with random weights and its configuration, as `timm.models.push_to_hf_hub` writes them."""
        timm = pytest.importorskip("timm")
        from safetensors.torch import save_file

        network = timm.create_model("resnet18", num_classes=5)
        weights = {name: torch.rand_like(value) if value.is_floating_point() else value
                   for name, value in network.state_dict().items()}  # fmt: skip
        save_file(weights, tmp_path / "model.safetensors")
        pixels = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.4, 0.5]}
        record = {"architecture": "resnet18", "num_classes": 5, "num_features": 512, "pretrained_cfg": {
            "tag": "mine", "custom_load": False, "input_size": [3, 224, 224], "num_classes": 5, "classifier": "fc",
            "first_conv": "conv1", "pool_size": [7, 7], "crop_pct": 0.9, "interpolation": "bicubic", **pixels}}  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(record))
        return tmp_path, weights

    @pytest.mark.filterwarnings("ignore:The published weights of the timm backbone")
    def test_a_folder_of_timm_gives_weights_maps_and_pixels(self, folder):
        folder, weights = folder
        model = DinoDetrForObjectDetection.from_backbone(folder, **SETTINGS)
        backbone = model.config.backbone_config
        assert (backbone.model_type, backbone.backbone) == ("timm_backbone", "resnet18")
        assert model.model.backbone.model.channels == [128, 256, 512]
        found = {name.removeprefix("_backbone."): x for name, x in model.model.backbone.model.state_dict().items()}
        assert len(found) > 50
        assert all(torch.equal(value, weights[name]) for name, value in found.items())
        assert pixel_settings(folder) == {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.4, 0.5]}

    @pytest.mark.parametrize("name", ["resnet18.a1_in1k", "timm/resnet18.a1_in1k"])
    def test_a_name_of_timm_is_found_with_or_without_its_owner(self, monkeypatch, name):
        timm = pytest.importorskip("timm")
        made = timm.create_model("resnet18.a1_in1k", features_only=True)
        asked = []
        monkeypatch.setattr(timm, "create_model", lambda name, **settings: asked.append((name, settings)) or made)
        loaded = load_pretrained_backbone(name)
        assert asked == [("resnet18.a1_in1k", {"pretrained": True, "features_only": True})]
        assert (loaded.config.backbone, loaded.config.out_indices) == ("resnet18.a1_in1k", [2, 3, 4])
        assert loaded.state_dict.keys() == made.state_dict().keys()
        assert pixel_settings(name)["image_mean"] == [0.485, 0.456, 0.406]

    def test_a_plain_transformer_of_timm_needs_named_maps(self, monkeypatch):
        timm = pytest.importorskip("timm")
        made = timm.create_model("vit_tiny_patch16_224", features_only=True)
        monkeypatch.setattr(timm, "create_model", lambda name, **settings: made)
        with pytest.raises(ValueError, match=r"strides 8, 16 and 32.*out_indices=\[-1\]"):
            load_pretrained_backbone("vit_tiny_patch16_224")
        assert load_pretrained_backbone("vit_tiny_patch16_224", out_indices=[-1]).config.out_indices == [-1]
        with pytest.raises(ValueError, match="by out_indices"):
            load_pretrained_backbone("vit_tiny_patch16_224", out_features=["blocks.11"])

    def test_unknown_names_and_a_missing_timm_are_said(self, monkeypatch):
        pytest.importorskip("timm")
        with pytest.raises(FileNotFoundError, match="timm has no model 'resnet99'"):
            load_pretrained_backbone("timm/resnet99")
        monkeypatch.setattr(pretrained_backbones, "is_timm_available", lambda: False)
        with pytest.raises(ImportError, match="pip install timm"):
            load_pretrained_backbone("timm/resnet18")


def test_the_method_is_in_the_public_class():
    assert dino_hf.DinoDetrForObjectDetection.backbone_loader is load_pretrained_backbone
