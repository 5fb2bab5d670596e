"""Importing the package and the command is cheap, and transformers knows the model whatever is imported first."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dino_hf
from dino_hf.cli.app import app

HEAVY = ("torch", "transformers", "numpy", "scipy", "PIL", "datasets", "matplotlib", "huggingface_hub")
# `--help` imports 300 modules, torch alone 900.
MOST_MODULES = 400

KNOWN = """
import dino_hf
from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor, DinoDetrModel
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForObjectDetection, pipeline
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.pipelines import PIPELINE_REGISTRY
from dino_hf.model.attention_backends import describe_backends
from dino_hf.runtime.pipeline import DinoDetrObjectDetectionPipeline
config = AutoConfig.for_model("dino_detr")
assert type(config) is DinoDetrConfig
assert AutoModel._model_mapping[DinoDetrConfig] is DinoDetrModel
assert AutoModelForObjectDetection._model_mapping[DinoDetrConfig] is DinoDetrForObjectDetection
assert IMAGE_PROCESSOR_MAPPING[DinoDetrConfig]["torchvision"] is DinoDetrImageProcessor
assert PIPELINE_REGISTRY.supported_tasks["object-detection"]["impl"] is DinoDetrObjectDetectionPipeline
assert set(describe_backends()) == {"cpu", "triton", "torch", "reference", "gather"}
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("module", ["dino_hf", "dino_hf.cli.app"])
def test_nothing_heavy_is_imported(module):
    imported = set(run(f"import {module}, sys; print(*sys.modules)").split())
    assert imported.isdisjoint(HEAVY)
    assert len(imported) < MOST_MODULES


def test_help_of_each_command_imports_nothing_heavy():
    code = (
        "import sys\nfrom dino_hf.cli.app import app\n"
        "for command in [one.name for one in app.registered_commands]:\n"
        "    try: app([command, '--help'])\n"
        "    except SystemExit as ended: assert ended.code == 0\n"
        "print('MODULES', *sys.modules)"
    )
    texts, imported = run(code).split("MODULES")
    assert texts.count("Usage:") == len(app.registered_commands) > 6
    assert set(imported.split()).isdisjoint(HEAVY)


@pytest.mark.parametrize("arguments", [[], ["train"]], ids=["dino-hf", "train"])
def test_help_takes_half_a_second_of_the_processor(arguments):
    code = (
        f"import sys, time; sys.argv = ['dino-hf', *{arguments}, '--help']\n"
        "from dino_hf.cli.app import app\n"
        "try: app()\n"
        "except SystemExit: print('SECONDS', time.process_time())"
    )
    assert float(run(code).split("SECONDS")[1]) < 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "from transformers import AutoModel, AutoImageProcessor, pipeline",
        "import transformers.models.auto.configuration_auto",
        "from dino_hf import DinoDetrForObjectDetection",
        "import dino_hf.model.image_processing_pil_dino_detr",
        "from dino_hf.model.ms_deform_attn import ms_deform_attn",
        "import dino_hf.runtime.pipeline",
        "from dino_hf import use_backend",
        "import dino_hf; from transformers import Trainer",
        "import dino_hf; import transformers.trainer_utils",
    ],
)
def test_transformers_knows_the_model_whatever_is_imported_first(first):
    run(first + KNOWN)


def test_names_for_type_checkers_are_those_that_are_found():
    tree = ast.parse(Path(dino_hf.__file__).read_text(encoding="utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    declared = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert declared == dino_hf._NAMES
    assert set(dino_hf.__all__) == {"__version__", *dino_hf._NAMES}
    for name in dino_hf.__all__:
        assert getattr(dino_hf, name) is not None


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="nothing_here"):
        dino_hf.nothing_here  # noqa: B018
