"""The common tests of transformers' own models and image processors, on DINO: make test-transformers.

Their text is in the source distribution of the installed transformers. pip downloads it into a scratch folder, which is deleted.
Arguments are those of pytest. What does not apply is listed here with its reason.
"""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import transformers

NOT_FOR_US = {
    "test_resize_tokens_embeddings": "there are no tokens",
    "test_resize_embeddings_untied": "there are no tokens",
    "test_inputs_embeds": "there are no tokens",
    "test_inputs_embeds_matches_input_ids": "there are no tokens",
    "test_model_get_set_embeddings": "the level embedding stands in for token embeddings",
    "test_retain_grad_hidden_states_attentions": "weights of sampling points are copies beside a fused operator",
    "test_feed_forward_chunking": "there is none",
}
NOT_FOR_OUR_IMAGES = {
    "test_call_numpy_4_channels": "images have three channels, and other means and deviations are refused in a sentence",
    "test_pil_can_run_without_torchvision": "its new process does not import dino_hf, which registers our classes",
}

HEAD = '''
import sys
import types
import unittest

sys.path[:0] = [{root!r}, {scratch!r}]


class Missing(types.ModuleType):
    """A module that the source distribution leaves out: its mixins have no tests."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {{}}) if name[:1].isupper() else {{}}


for name in ("exporters", "exporters.test_export", "generation", "generation.test_utils", "distributed_testing_utils",
             "utils", "utils.test_configuration_utils"):
    sys.modules["tests." + name] = Missing("tests." + name)
sys.path.insert(0, {ours!r})
'''

MODEL_TESTS = """
import torch
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

MODEL_MAPPING_NAMES["dino_detr"] = "DinoDetrModel"  # which has no loss of its own
from helpers import NUM_LABELS, tiny_config, tiny_images


class Tester:
    is_training = True
    batch_size, num_queries, num_labels = 2, 15, NUM_LABELS
    encoder_seq_length = key_length = 8 * 13 + 4 * 7 + 2 * 4 + 1 * 2
    decoder_seq_length = decoder_key_length = 15
    num_hidden_layers, num_attention_heads, hidden_size, seq_length = 2, 4, 64, 15

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return tiny_config(decoder_layers=2, is_encoder_decoder=True)

    def prepare_config_and_inputs_for_common(self):
        pixel_values, pixel_mask = tiny_images()
        return self.get_config(), {{"pixel_values": pixel_values, "pixel_mask": pixel_mask}}


class DinoTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (DinoDetrModel, DinoDetrForObjectDetection)
    pipeline_model_mapping = {{}}
    is_encoder_decoder = True
    test_resize_embeddings = test_torch_exportable = test_missing_keys = False
    has_attentions = False

    def setUp(self):
        self.model_tester = Tester(self)
        self.config_tester = ConfigTester(self, config_class=DinoDetrConfig, has_text_modality=False, common_properties=["d_model"])

    def test_config(self):
        self.config_tester.run_common_tests()

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
        if return_labels and model_class is DinoDetrForObjectDetection:
            inputs["labels"] = [
                {{"class_labels": torch.ones(3, dtype=torch.long), "boxes": torch.full((3, 4), 0.4)}} for _ in range(2)
            ]
        return inputs


for name, reason in {skipped!r}.items():
    setattr(DinoTest, name, unittest.skip(reason)(lambda self: None))
"""

IMAGE_TESTS = '''
import numpy as np
from PIL import Image

sys.modules["fetch_hub_objects_for_ci"] = Missing("fetch_hub_objects_for_ci")
from tests import test_image_processing_common
from tests.test_image_processing_common import ImageProcessingTester, ImageProcessingTestMixin

from dino_hf import DinoDetrImageProcessor, DinoDetrImageProcessorPil


def smooth_picture(url):
    """In place of a photograph that would be downloaded."""
    small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC)


test_image_processing_common.load_test_image = smooth_picture


class Tester(ImageProcessingTester):
    def __init__(self, parent, **settings):
        settings.setdefault("size", {{"shortest_edge": 18, "longest_edge": 1333}})
        super().__init__(parent, **settings)

    def _get_image_processing_classes(self):
        return {{"torchvision": DinoDetrImageProcessor, "pil": DinoDetrImageProcessorPil}}


class DinoImagesTest(ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = Tester


for name, reason in {skipped!r}.items():
    setattr(DinoImagesTest, name, unittest.skip(reason)(lambda self: None))
'''


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"transformers=={transformers.__version__}"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            ":all:",
            "--dest",
            folder,
            wanted,
        ]
        subprocess.run(command, check=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, "parameterized"]
        subprocess.run(command, check=True)  # which the tests import
        [archive] = Path(folder).glob("transformers-*.tar.gz")
        with tarfile.open(archive) as content:
            content.extractall(folder, filter="data")
        [tests] = Path(folder).glob("transformers-*/tests")
        (tests / "__init__.py").touch()
        ours = str(Path(__file__).parents[1])
        modules = []
        for name, text, skipped in (("model", MODEL_TESTS, NOT_FOR_US), ("images", IMAGE_TESTS, NOT_FOR_OUR_IMAGES)):
            modules.append(Path(folder) / f"test_dino_{name}_in_transformers.py")
            content = (HEAD + text).format(root=str(tests.parent), scratch=folder, ours=ours, skipped=skipped)
            modules[-1].write_text(content, encoding="utf-8")
        return pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", folder, *map(str, modules), *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
