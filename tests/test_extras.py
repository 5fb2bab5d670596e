"""Each extra is one: without its packages all else works, and what needs them says how to install them."""

import json
import os
import subprocess
import sys
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from dino_hf.common import installation
from dino_hf.common.installation import install_command, with_install_command

SCRIPT = Path(__file__).parent / "scripts/without_packages.py"
PACKAGES = {
    "video": ("av",),
    "timm": ("timm",),
    "lora": ("peft",),
    "onnx": ("onnx", "onnxruntime", "onnxscript"),
    "kernels": ("kernels",),
    "tensorboard": ("tensorboard", "tensorboardX"),
}


def run_without(folder: Path, *packages: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, *packages], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.endswith("passed\n")


@pytest.mark.slow
@pytest.mark.parametrize("extra", PACKAGES)
def test_without_an_extra_all_else_works(extra, tmp_path):
    run_without(tmp_path, *PACKAGES[extra])


@pytest.mark.slow
def test_without_any_extra_all_else_works(tmp_path):
    run_without(tmp_path, *(package for packages in PACKAGES.values() for package in packages))


URL = "https://example.org/dino.git"


@pytest.mark.parametrize(
    ("noted", "command"),
    [
        (None, "pip install 'dino_hf[video]'"),
        ("not json", "pip install 'dino_hf[video]'"),
        ({"url": "file:///a%20b/c", "dir_info": {"editable": True}}, "pip install -e '/a b/c[video]'"),
        ({"url": "file:///clone", "dir_info": {}}, "pip install '/clone[video]'"),
        (
            {"url": "file:///d/dino_hf-1-py3-none-any.whl", "archive_info": {}},
            "pip install '/d/dino_hf-1-py3-none-any.whl[video]'",
        ),
        (
            {"url": URL, "vcs_info": {"vcs": "git", "commit_id": "abc"}},
            f"pip install 'dino_hf[video] @ git+{URL}@abc'",
        ),
        ({"url": "https://e.org/d.whl", "archive_info": {}}, "pip install 'dino_hf[video] @ https://e.org/d.whl'"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="paths of other systems")
def test_the_cure_fits_how_the_package_was_installed(noted, command, monkeypatch, tmp_path):
    folder = tmp_path / "dino_hf-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Name: dino_hf\nVersion: 1\n")
    if noted is not None:
        (folder / "direct_url.json").write_text(noted if isinstance(noted, str) else json.dumps(noted))
    monkeypatch.setattr(installation, "distribution", lambda name: Distribution.at(folder))
    assert install_command("video") == command


def test_the_error_of_another_package_stays():
    error = ImportError("no libx", name="libx.sub")
    assert with_install_command(error, "av", "videos", "video") is error
    assert str(with_install_command(ImportError("", name="av.error"), "av", "videos", "video")).startswith(
        "av is not installed, but videos need it: pip"
    )
