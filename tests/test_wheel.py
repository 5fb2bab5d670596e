"""What `pip install` puts on a machine: the package with the sources of its kernel, and nothing called kernels."""

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.conversion.convert_back import convert_back
from dino_hf.conversion.published import lookup_published
from dino_hf.model.attention_backends import ENVIRONMENT_VARIABLE
from file_server import serve
from helpers import needs_compiler
from inference_toys import noise
from toy_checkpoints import original_tensors, settings

pytestmark = needs_compiler

ROOT = Path(__file__).parents[1]

USE = """
import sys, torch, dino_hf
from pathlib import Path
from dino_hf.model.ms_deform_attn import ms_deform_attn
assert Path(dino_hf.__file__).is_relative_to(sys.prefix), dino_hf.__file__
value, weights = torch.randn(2, 17, 3, 4), torch.rand(2, 7, 3, 2, 2)
locations = torch.rand(2, 7, 3, 2, 2, 2)
with dino_hf.use_backend("cpu"):
    found = ms_deform_attn(value, ((3, 5), (1, 2)), locations, weights)
reference = ms_deform_attn(value, ((3, 5), (1, 2)), locations, weights, backend="reference")
print((found - reference).abs().max().item() < 1e-5)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--quiet", "-w", str(folder)]
    subprocess.run([sys.executable, *command], check=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_carries_the_kernel_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "dino_hf",
        next(n for n in names if "dist-info" in n).split("/")[0],
    }
    assert {"dino_hf/_kernels/build.py", "dino_hf/py.typed"} <= set(names)
    for file in (ROOT / "kernels/ms-deform-attn").rglob("*"):
        name = file.relative_to(ROOT / "kernels").as_posix()
        is_source = file.suffix in (".py", ".cpp", ".h", ".toml") and not name.startswith(
            ("ms-deform-attn/tests", "ms-deform-attn/benchmarks", "ms-deform-attn/build/")
        )
        assert (f"dino_hf/_kernels/{name}" in names) == is_source, name


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """A virtual environment with the wheel."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    site_packages = next(environment.glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site_packages)
    # Everything but dino_hf comes from this environment: torch would take minutes to install again.
    (site_packages / "others.pth").write_text(str(Path(torch.__file__).parents[1]))
    return environment


def test_the_installed_package_builds_its_kernel_outside_the_repository(environment, tmp_path):
    run = subprocess.run(
        [environment / "bin/python", "-c", USE],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "DINO_HF_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (0, "True\n"), run.stderr
    assert list((tmp_path / "cache/kernels").glob("*/torch-stable-abi*/*.so"))


def test_the_installed_command_converts_a_checkpoint(environment, tmp_path):
    torch.save({"model": original_tensors(), "args": settings()}, tmp_path / "checkpoint.pth")
    run = subprocess.run(
        [environment / "bin/python", "-m", "dino_hf", "convert", "checkpoint.pth", "converted", "--verify"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "DINO_HF_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert "the two compute the same" in run.stdout
    assert (tmp_path / "converted/model.safetensors").is_file()


@pytest.mark.slow
def test_the_first_command_of_the_readme_runs_from_nothing_but_the_wheel_and_a_server(environment, tmp_path):
    """With a file of the published architecture and random weights: 190 MB."""
    name = "detrex/dino_r50_4scale_12ep"
    command = f"predict {name} street.jpg --save found"
    assert f"dino-hf {command}\n" in (ROOT / "README.md").read_text(encoding="utf-8")
    row = lookup_published(name)
    config = DinoDetrConfig(num_labels=80, share_decoder_heads=False, num_extra_label_embeddings=0)
    DinoDetrForObjectDetection(config).save_pretrained(tmp_path / "random")
    DinoDetrImageProcessor().save_pretrained(tmp_path / "random")
    convert_back(tmp_path / "random", "detrex", tmp_path / row.file)
    noise(120, 80).save(tmp_path / "street.jpg")
    with serve() as server:
        server.files[f"/detrex/{row.file}"] = (tmp_path / row.file).read_bytes()
        variables = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "DINO_HF_MIRROR": server.address}
        for options in ([], ["--overwrite"]):
            run = subprocess.run(
                [environment / "bin/python", "-m", "dino_hf", *command.split(), *options],
                cwd=tmp_path,
                env=variables | {ENVIRONMENT_VARIABLE: "torch", "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
            )
            assert run.returncode == 0, run.stderr
            assert "Results are in found" in run.stdout
        assert len(server.requests) == 1
    assert (tmp_path / "found/predictions.json").is_file()
    assert (tmp_path / f".cache/dino_hf/models/{row.title}/model.safetensors").is_file()
