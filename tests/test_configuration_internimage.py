import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoBackbone, AutoConfig

from dino_hf.model.backbone_internimage import DinoDetrInternImageBackbone
from dino_hf.model.configuration_internimage import DinoDetrInternImageConfig
from dino_hf.model.package_warning import DinoDetrWarning
from helpers import INTERNIMAGE, tiny_config


def test_the_defaults_are_the_tiny_model():
    config = DinoDetrInternImageConfig()
    assert (config.hidden_sizes, config.depths) == ([64, 128, 256, 512], [4, 4, 18, 4])
    assert [width / groups for width, groups in zip(config.hidden_sizes, config.num_groups, strict=True)] == [16] * 4
    with pytest.warns(DinoDetrWarning, match="stage4"):
        assert tiny_config(backbone_config=config).backbone_config.out_features == ["stage2", "stage3", "stage4"]


@pytest.mark.parametrize(
    ("wrong", "fact"),
    [
        ({"num_groups": [1, 2, 4]}, r"num_groups=\[1, 2, 4\]"),
        ({"num_groups": [3, 2, 4, 8]}, r"num_groups=\[3, 2, 4, 8\]"),
        ({"embed_dim": 15}, "embed_dim=15"),
        ({"depths": [1, 0, 1, 1]}, r"depths=\[1, 0, 1, 1\]"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0"),
        ({"offset_scale": 0.0}, "offset_scale=0.0"),
        ({"offset_scale": float("nan")}, "offset_scale=nan"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps=inf"),
        ({"mlp_ratio": -1}, "mlp_ratio=-1"),
        ({"post_norm": "yes"}, "post_norm"),
        ({"depths": [1, 1, 10**6, 1]}, "depths"),
    ],
)
def test_wrong_settings_are_named(wrong, fact):
    with pytest.raises((StrictDataclassError, ValueError), match=fact):
        tiny_config(backbone_config=INTERNIMAGE | wrong)


def test_a_saved_backbone_is_the_same(tmp_path):
    settings = {name: value for name, value in INTERNIMAGE.items() if name != "model_type"}
    config = DinoDetrInternImageConfig(**settings, offset_scale=2.0, post_norm=True, out_features=["stage1", "stage3"])
    model = AutoBackbone.from_config(config)
    model.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is DinoDetrInternImageConfig
    assert (loaded.offset_scale, loaded.post_norm, loaded.out_features) == (2.0, True, ["stage1", "stage3"])
    assert DinoDetrInternImageBackbone.from_pretrained(tmp_path).channels == [16, 64]
