"""First use, a machine without a compiler, a home that cannot be written, and the command that tells about it."""

import errno
import os
import shutil
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from dino_hf.attention_backends import BackendUnavailable
from dino_hf.tools import cli, kernel_loading
from helpers import needs_compiler

pytestmark = needs_compiler

IN_A_NEW_PROCESS = """
import sys, warnings, torch
from dino_hf import ms_deform_attn
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    inputs = torch.randn(2, 17, 3, 4), ((3, 5), (1, 2)), torch.rand(2, 7, 3, 2, 2, 2), torch.rand(2, 7, 3, 2, 2)
    for _ in range(2):
        out = ms_deform_attn(*inputs)
caught = [str(warning.message) for warning in caught if "ms_deform_attn" in str(warning.message)]
print(torch.equal(out, ms_deform_attn(*inputs, backend="torch")), len(caught), *caught)
try:
    ms_deform_attn(*inputs, backend="cpu")
except RuntimeError as error:
    print(error)
"""


def run(tmp_path, **environment) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS],
        capture_output=True,
        text=True,
        env={**os.environ, "DINO_HF_CACHE": str(tmp_path / "cache"), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_without_a_compiler_pytorch_takes_over_with_one_warning(tmp_path):
    chosen, named = run(tmp_path, PATH=str(tmp_path), CXX="")
    assert chosen.startswith("True 1 The ms_deform_attn backend 'cpu' cannot run here: there is no C++ compiler")
    assert "A slower one takes its place" in chosen
    assert named.startswith("The ms_deform_attn backend 'cpu' cannot run here: there is no C++ compiler")


def test_a_cache_that_is_no_folder_is_a_reason_too(tmp_path):
    (tmp_path / "cache").write_text("a file")
    chosen, named = run(tmp_path)
    assert chosen.startswith("True 1 The ms_deform_attn backend 'cpu' cannot run here")
    assert "Not a directory" in named


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_may_not_be_written_is_replaced_for_the_process(tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    (chosen,) = run(tmp_path)  # nothing more: the kernel, asked for by name, runs
    assert chosen.split()[1] == "0"


def test_the_cache_is_where_the_user_wants_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_HF_CACHE", str(tmp_path / "mine"))
    assert kernel_loading.cache_dir() == tmp_path / "mine"
    monkeypatch.delenv("DINO_HF_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "all"))
    assert kernel_loading.cache_dir() == tmp_path / "all/dino_hf"


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), OSError(errno.EROFS, "read-only")])
def test_a_home_that_cannot_be_written_builds_for_this_process(tmp_path, caplog, error):
    """The same as above, whoever runs the tests."""
    folders = []

    class Builder:
        @staticmethod
        def build_variant(project, folder, native):
            folders.append(folder)
            if len(folders) == 1:
                raise error
            return folder

    built = kernel_loading._build(Builder, tmp_path, "identity", native=False)
    assert built == folders[1] != folders[0]
    assert "set DINO_HF_CACHE" in caplog.text


def test_a_user_without_a_home_builds_for_this_process_too(tmp_path, monkeypatch, caplog):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    class Builder:
        build_variant = staticmethod(lambda project, folder, native: folder)

    monkeypatch.setattr(kernel_loading, "cache_dir", homeless)
    assert kernel_loading._build(Builder, tmp_path, "identity", native=False).is_dir()
    assert "Could not determine home directory" in caplog.text


FROM_FOUR_THREADS = """
import threading, torch
from dino_hf import ms_deform_attn
inputs = torch.randn(2, 17, 3, 4), ((3, 5), (1, 2)), torch.rand(2, 7, 3, 2, 2, 2), torch.rand(2, 7, 3, 2, 2)
barrier, found = threading.Barrier(4), []
def first_use():
    barrier.wait()
    found.append(ms_deform_attn(*inputs))
threads = [threading.Thread(target=first_use) for _ in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(found), all(torch.equal(found[0], other) for other in found))
"""


def test_several_threads_may_be_the_first(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FROM_FOUR_THREADS],
        capture_output=True,
        text=True,
        env={**os.environ, "DINO_HF_CACHE": str(tmp_path)},
    )
    assert done.stdout == "4 True\n", done.stderr


def test_sources_that_are_gone_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(kernel_loading, "kernel_sources", lambda: tmp_path)
    with pytest.raises(BackendUnavailable, match=f"its sources are not at {tmp_path}"):
        kernel_loading.load_kernel(native=True)


def test_the_kernel_is_loaded_once():
    assert kernel_loading.load_kernel(native=True) is kernel_loading.load_kernel(native=True)


def test_env_tells_what_runs_here():
    result = CliRunner().invoke(cli.app, ["env"])
    assert result.exit_code == 0
    for line in (
        f"torch         {torch.__version__}",
        "  reference   available",
        "  cpu  float32   cpu",
        "  cpu  float64   torch",
    ):
        assert line in result.output
    if not torch.cuda.is_available():
        assert "  triton      out: there is no CUDA device" in result.output


def test_a_build_ahead_of_time_is_used_and_needs_no_compiler(tmp_path):
    """As in a container that has a compiler when it is made and none when it runs."""
    sources = tmp_path / "kernels"
    shutil.copytree(
        kernel_loading.kernel_sources(), sources, ignore=shutil.ignore_patterns("build", "__pycache__", "tests")
    )
    subprocess.run([sys.executable, sources / "build.py"], check=True, capture_output=True)
    use = (
        "import sys, torch, dino_hf; from pathlib import Path; from dino_hf.tools import kernel_loading; "
        "kernel_loading.kernel_sources = lambda: Path(sys.argv[1]); "
        "print(kernel_loading.load_kernel(native=True).__file__)"
    )
    environment = {**os.environ, "DINO_HF_CACHE": str(tmp_path / "cache"), "PATH": "", "CXX": ""}
    done = subprocess.run([sys.executable, "-c", use, sources], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(sources / "ms-deform-attn/build/torch-stable-abi"))
    assert not (tmp_path / "cache").exists()
