"""Every command and the Python API while some packages cannot be imported: without_packages.py FOLDER PACKAGE..."""

import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

FOLDER, HIDDEN = Path(sys.argv[1]), set(sys.argv[2:])


class Hidden(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return None


sys.meta_path.insert(0, Hidden())

import importlib.metadata  # noqa: E402
import importlib.util  # noqa: E402

find_spec, find_version = importlib.util.find_spec, importlib.metadata.version


def spec_of_others(name, package=None):
    return None if name.partition(".")[0] in HIDDEN else find_spec(name, package)


def version_of_others(name):
    if name in HIDDEN:
        raise importlib.metadata.PackageNotFoundError(name)
    return find_version(name)


importlib.util.find_spec, importlib.metadata.version = spec_of_others, version_of_others

from typer.testing import CliRunner  # noqa: E402

from dino_hf import *  # noqa: E402, F403
from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor  # noqa: E402
from dino_hf.cli.app import app  # noqa: E402
from dino_hf.common.installation import install_command  # noqa: E402
from dino_hf.training import add_lora  # noqa: E402

BACKBONE = {
    "model_type": "resnet",
    "depths": [1] * 4,
    "hidden_sizes": [16, 24, 32, 40],
    "embedding_size": 8,
    "layer_type": "basic",
}


def call(*arguments, exit_code=0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == exit_code, (arguments, result.exit_code, result.output)
    return result.output


def says_the_cure(text: str, package: str, extra: str) -> None:
    assert f"{package} is not installed" in text, text
    assert install_command(extra) in text, text


config = DinoDetrConfig(
    backbone_config=BACKBONE,
    num_labels=3,
    num_queries=12,
    d_model=64,
    encoder_layers=1,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    num_denoising=4,
)
config.save_pretrained(FOLDER / "untrained")
DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 72}).save_pretrained(FOLDER / "untrained")

call("scenes", FOLDER / "data", "--num-train", 3, "--num-validation", 2)
call("doctor", FOLDER / "data", "--pictures", FOLDER / "pictures", "--json", FOLDER / "findings.json")
call("augment", FOLDER / "data", "--output", FOLDER / "augmented.png", "--num-images", 1, "--num-samples", 1)
training = ("--max-steps", 2, "--eval-steps", 2, "--batch-size", 2, "--use-cpu")
call("train", FOLDER / "data", "--model", FOLDER / "untrained", "--output-dir", FOLDER / "out", *training)
call("eval", FOLDER / "out", FOLDER / "data", "--output-dir", FOLDER / "eval", "--num-bootstrap", 40, "--device", "cpu")
image = next((FOLDER / "data").rglob("*.png"), None) or next((FOLDER / "data").rglob("*.jpg"))
call("predict", FOLDER / "out", image, "--save", FOLDER / "found", "--device", "cpu")
call("env")

if "av" in HIDDEN:
    (FOLDER / "clip.mp4").write_bytes(b"no video")
    result = CliRunner().invoke(app, ["predict", str(FOLDER / "out"), str(FOLDER / "clip.mp4"), "--device", "cpu"])
    assert result.exit_code in (1, 3), result.output
    says_the_cure(result.output, "av", "video")
if "onnx" in HIDDEN:
    says_the_cure(call("export", FOLDER / "out", "--output", FOLDER / "m.onnx", exit_code=1), "onnx", "onnx")
model = DinoDetrForObjectDetection(config)
if "peft" in HIDDEN:
    try:
        add_lora(model)
    except ImportError as error:
        says_the_cure(str(error), "peft", "lora")
    else:
        raise AssertionError("peft is hidden, but was used")
if "timm" in HIDDEN:
    try:
        DinoDetrForObjectDetection(
            DinoDetrConfig(backbone_config={"model_type": "timm_backbone", "backbone": "resnet18"})
        )
    except ImportError as error:
        if "timm" not in str(error):
            raise
    else:
        raise AssertionError("timm is hidden, but was used")
loaded = HIDDEN & {name.partition(".")[0] for name in sys.modules}
assert not loaded, loaded
print("passed")
