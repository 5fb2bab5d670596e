"""Code that lies in a folder of a model never runs, whoever asks: commands, converter and Python API."""

import ast
import builtins
import contextlib
import json
from pathlib import Path

import pytest
import torch
from transformers.dynamic_module_utils import HF_MODULES_CACHE
from typer.testing import CliRunner

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.cli.app import app
from dino_hf.common.scenes import make_scenes
from dino_hf.conversion import convert_checkpoint, verify_conversion
from dino_hf.inference.loading import load_detector, load_image_processor
from helpers import tiny_config

ROOT = Path(__file__).parents[1]
MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModel": "evil.EvilModel",
    "AutoBackbone": "evil.EvilModel",
    "AutoModelForObjectDetection": "evil.EvilModel",
    "AutoImageProcessor": "evil.EvilProcessor",
    "AutoProcessor": "evil.EvilProcessor",
}
CODE = """
from pathlib import Path
Path({marker!r}).touch()
class EvilConfig: pass
EvilModel = EvilProcessor = EvilConfig
"""


def evil_config(content: dict) -> dict:
    return content | {"model_type": "evil", "auto_map": MAP, "architectures": ["EvilModel"]}


def evil_backbone(content: dict) -> dict:
    backbone = content["backbone_config"] | {"auto_map": MAP, "model_type": "evil"}
    return content | {"backbone_config": backbone, "auto_map": MAP}


# How a folder asks for its code: which of its files says what.
WAYS = {
    "a type of its own": ("config.json", evil_config),
    "our type": ("config.json", lambda content: content | {"auto_map": MAP}),
    "no type": ("config.json", lambda content: {"auto_map": MAP, "architectures": ["EvilModel"]}),
    "another repository": (
        "config.json",
        lambda content: (
            evil_config(content) | {"auto_map": {name: f"evil/evil--{value}" for name, value in MAP.items()}}
        ),
    ),
    "its backbone": ("config.json", evil_backbone),
    "its image processor": (
        "preprocessor_config.json",
        lambda content: content | {"auto_map": MAP, "image_processor_type": "EvilProcessor"},
    ),
    "our image processor": ("preprocessor_config.json", lambda content: content | {"auto_map": MAP}),
    "pipelines": (
        "config.json",
        lambda content: (
            content | {"custom_pipelines": {"object-detection": {"impl": "evil.EvilModel", "pt": ["EvilModel"]}}}
        ),
    ),
}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    torch.manual_seed(0)
    DinoDetrForObjectDetection(tiny_config()).save_pretrained(folder / "model")
    DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 72}).save_pretrained(folder / "model")
    make_scenes(folder / "data/train", 3, seed=0)
    make_scenes(folder / "data/validation", 2, seed=1)
    return folder


@pytest.fixture(params=WAYS)
def attack(request, ours, tmp_path, monkeypatch):
    """A copy of a model whose folder asks for its code, and where that leaves a mark. Whoever is asked says yes."""
    asked, marker = [], tmp_path / "ran"
    monkeypatch.setattr(builtins, "input", lambda *question: asked.append(question) or "y")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / "evil"
    folder.mkdir()
    for file in (ours / "model").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    name, change = WAYS[request.param]
    (folder / name).write_text(json.dumps(change(json.loads((folder / name).read_text()))))
    for name in ("evil.py", "evil/__init__.py", "modeling.py", "configuration.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE.format(marker=str(marker)))
    yield folder
    assert not marker.exists()
    assert not asked
    assert not list(Path(HF_MODULES_CACHE).rglob("evil.py"))


def script(main, *arguments) -> None:
    with pytest.raises(SystemExit) as ended:
        main([str(one) for one in arguments])
    assert ended.value.code in (0, 1) or str(ended.value.code).startswith("error: ")


def test_no_code_of_a_folder_runs_in_the_converter(attack, ours, tmp_path):
    with pytest.raises(SystemExit) if attack_is_refused(attack) else contextlib.nullcontext():
        convert_checkpoint.main(["--checkpoint", str(attack), "--to", "mmdet", "--output", str(tmp_path / "back.pth")])
    script(verify_conversion.main, attack, ours / "model")
    script(verify_conversion.main, ours / "model", attack)


def attack_is_refused(folder: Path) -> bool:
    """A configuration that is still one of ours is read, by our own code."""
    content = json.loads((folder / "config.json").read_text())
    return content.get("model_type") != "dino_detr" or content["backbone_config"]["model_type"] == "evil"


def test_no_code_of_a_folder_runs_in_commands_and_in_python(attack, ours, tmp_path):
    data, out = ours / "data", tmp_path / "out"
    commands = (
        ("predict", attack, data / "validation", "--save", out / "predict", "--device", "cpu"),
        (
            "train",
            data,
            "--model",
            attack,
            "--output-dir",
            out / "train",
            "--dry-run",
            "--use-cpu",
            "--report-to",
            "none",
        ),
    )
    for command in commands:
        result = CliRunner().invoke(app, [str(one) for one in command])
        assert result.exit_code in (0, 1), result.output
        assert "Traceback" not in result.stderr, result.stderr
    for load in (load_detector, load_image_processor):
        with contextlib.suppress(ValueError, OSError):
            load(attack)


def calls_of_our_code():
    for place in ("src", "convert_scripts", "kernels", "benchmarks"):
        for path in sorted((ROOT / place).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), node


def keyword(node: ast.Call, name: str) -> object:
    value = next((one.value for one in node.keywords if one.arg == name), None)
    return value.value if isinstance(value, ast.Constant) else None


def test_all_auto_classes_are_told_to_trust_no_code():
    found = []
    for place, function, node in calls_of_our_code():
        owner, _, method = function.rpartition(".")
        if method != "from_pretrained" or not owner or owner.startswith(("DinoDetr", "ResNetBackbone", "super()")):
            continue
        found.append(owner)
        assert keyword(node, "trust_remote_code") is False, f"{place}: {ast.unparse(node)}"
    assert len(found) >= 5


def test_nothing_is_unpickled_or_run_but_what_torch_calls_safe():
    forbidden = {
        "eval",
        "exec",
        "pickle.load",
        "pickle.loads",
        "yaml.load",
        "yaml.unsafe_load",
        "joblib.load",
        "os.system",
    }
    for place, function, node in calls_of_our_code():
        assert function not in forbidden, place
        if function == "torch.load" and not place.startswith("kernels"):
            assert keyword(node, "weights_only") is True, place
        if function == "np.load":
            assert keyword(node, "allow_pickle") in (None, False), place
        assert keyword(node, "shell") is not True, place
