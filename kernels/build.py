"""Builds the kernel projects in this folder without kernel-builder: with Python and torch, and a C++ compiler if there is one.

    python kernels/build.py                       all projects, into kernels/<project>/build
    python kernels/build.py --output-dir DIR      one folder for each project in DIR

What it writes is what `kernels.get_local_kernel` loads: `torch-universal`, Python only, and `torch-stable-abi...`, the same
with the compiled CPU kernel, for every torch from the version in build.toml on. dino_hf calls `build_variant` on first use.
"""

import argparse
import functools
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import torch

_BUILT = "built.json"  # what a build consists of


class BuildError(Exception):
    """Why a kernel cannot be built, in one sentence."""


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler: $CXX, or the first of c++, g++ and clang++ on the path."""
    if os.environ.get("CXX", "").strip():
        try:
            command = shlex.split(os.environ["CXX"])
        except ValueError:  # quotes that do not close
            return None
        return command if shutil.which(command[0]) else None
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def read_settings(project: Path) -> dict:
    """build.toml."""
    return tomllib.loads((project / "build.toml").read_text(encoding="utf-8"))


def variant_name(project: Path, native: bool) -> str:
    """The name by which the kernels library knows what a build runs on.

    It takes a build of torch with CUDA for a CUDA machine, whether or not there is a GPU; so the name follows torch.
    """
    if not native:
        return "torch-universal"
    abi = read_settings(project)["torch"]["stable-abi"].replace(".", "")
    cuda = torch.version.cuda
    backend = f"cu{cuda.replace('.', '')}" if cuda else "cpu"
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    return f"torch-stable-abi{abi}-{backend}-{machine}-{platform.system().lower()}"


@functools.cache
def kernel_id(project: Path, native: bool) -> str:
    """Name of the module and of its operators' namespace: equal for equal sources, different for all others."""
    digest = hashlib.sha256()
    for file in sorted(_sources(project)):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(project).as_posix()} {len(content)}\n".encode() + content)
    digest.update(Path(__file__).read_bytes())
    name = read_settings(project)["general"]["name"].replace("-", "_")
    return f"_{name}_{'native' if native else 'universal'}_{digest.hexdigest()[:12]}"


def _python_package(project: Path) -> Path:
    return project / "torch-ext" / read_settings(project)["general"]["name"].replace("-", "_")


def _sources(project: Path) -> list[Path]:
    files = [project / "build.toml", *_python_package(project).glob("*.py")]
    return files + [project / name for name in read_settings(project)["torch"]["src"]]


def find_variant(project: Path, output_dir: Path, native: bool) -> Path | None:
    """The folder of a variant in `output_dir` if it was built from the sources as they are now."""
    variant = output_dir / variant_name(project, native)
    return variant if _is_current(variant, kernel_id(project, native)) else None


def build_variant(project: Path, output_dir: Path, native: bool) -> Path:
    """Build one variant into `output_dir`, unless it is there already.

    Safe when several processes do it at once: each builds in a folder of its own, and the first to finish puts it in place.

    Args:
        project: folder with build.toml.
        output_dir: folder that gets `<variant name>/`.
        native: compile the C++ kernel; else Python only.
    Returns:
        the variant's folder.
    Raises:
        BuildError: no compiler, or what it complains about.
        OSError: the folder cannot be written.
    """
    if found := find_variant(project, output_dir, native):
        return found
    identity = kernel_id(project, native)
    target = output_dir / variant_name(project, native)
    output_dir.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=output_dir, prefix=f".{target.name}."))
    try:
        for file in _python_package(project).glob("*.py"):
            shutil.copy(file, scratch)
        (scratch / "_ops.py").write_text(_ops_source(identity, native), encoding="utf-8")
        (scratch / "metadata.json").write_text(_metadata(project, identity), encoding="utf-8")
        if native:
            compile_library(project, scratch / f"{identity}.abi3.so", identity)
        sizes = {file.name: file.stat().st_size for file in scratch.iterdir()}
        (scratch / _BUILT).write_text(json.dumps({"id": identity, "sizes": sizes}), encoding="utf-8")
        scratch.chmod(0o755)
        if target.exists() and not _is_current(target, identity):
            shutil.rmtree(target)  # of older sources
        try:
            scratch.replace(target)
        except OSError:
            if not _is_current(target, identity):  # else another process was first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _is_current(variant: Path, identity: str) -> bool:
    """Built from these sources, and whole: a full disk or a crash may have cut files short, and to load one can end the process."""
    try:
        built = json.loads((variant / _BUILT).read_text(encoding="utf-8"))
        sizes = {name: (variant / name).stat().st_size for name in built["sizes"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return built["id"] == identity and sizes == built["sizes"]


def compile_library(project: Path, library: Path, namespace: str) -> None:
    """Compile the C++ sources of build.toml, side by side, into one shared library."""
    compiler = find_compiler()
    if compiler is None:
        named = (
            f"CXX={os.environ['CXX']!r} is not on the path"
            if os.environ.get("CXX", "").strip()
            else "no c++, g++ or clang++ on the path"
        )
        raise BuildError(f"there is no C++ compiler ({named}); install g++, or set CXX")
    settings = read_settings(project)["torch"]
    root = Path(torch.__file__).parent
    major, minor = map(int, settings["stable-abi"].split("."))
    flags = [
        "-std=c++17",
        "-fPIC",
        f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000",
        f"-DTORCH_EXTENSION_NAME={namespace}",
        f"-I{root / 'include'}",
        *(f"-I{project / folder}" for folder in settings["include"]),
        *settings["cxx-flags"],
    ]
    sources = [project / name for name in settings["src"] if name.endswith(".cpp")]
    with tempfile.TemporaryDirectory() as scratch:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        running = [
            _start([*compiler, *flags, "-c", str(source), "-o", str(output)])
            for source, output in zip(sources, objects, strict=True)
        ]
        _finish(running)
        # GCC would otherwise make symbols unique in the process: two versions of the kernel could not be loaded.
        unique = ["-fno-gnu-unique"] if _is_gcc(compiler) else []
        undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
        libraries = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
        link = [*compiler, "-shared", *unique, *undefined, *map(str, objects), "-o", str(library), *libraries]
        _finish([_start(link)])


def _is_gcc(compiler: list[str]) -> bool:
    told = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout
    return "Free Software Foundation" in told


def _start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def _finish(processes: list[subprocess.Popen]) -> None:
    outputs = [process.communicate()[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode:
            first = next((line for line in output.splitlines() if "error:" in line), output.strip()[-300:])
            raise BuildError(f"the C++ compiler failed ({process.args[0]}, exit {process.returncode}): {first}")


def _ops_source(identity: str, native: bool) -> str:
    load = f'\ntorch.ops.load_library(Path(__file__).parent / "{identity}.abi3.so")' if native else ""
    path = "from pathlib import Path\n\n" if native else ""
    return f'''{path}import torch
{load}
ops = torch.ops.{identity}


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{identity}::{{op_name}}"
'''


def _metadata(project: Path, identity: str) -> str:
    general = read_settings(project)["general"]
    # The kernels library knows no "universal" backend; a build that also runs on a CPU calls itself that.
    return json.dumps(
        {
            "id": identity,
            "name": general["name"],
            "version": general["version"],
            "license": general["license"],
            "python-depends": [],
            "backend": {"type": "cuda" if torch.version.cuda and "native" in identity else "cpu"},
        },
        indent=2,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the kernel projects of this folder.")
    parser.add_argument("--output-dir", type=Path, help="default: the folder build in each project")
    output_dir = parser.parse_args().output_dir
    for settings in sorted(Path(__file__).resolve().parent.glob("*/build.toml")):
        project = settings.parent
        folder = output_dir.resolve() / project.name / "build" if output_dir else project / "build"
        try:
            for native in (False, True):
                print(build_variant(project, folder, native))
        except (BuildError, OSError) as error:
            sys.exit(f"error: {project.name}: {error}")


if __name__ == "__main__":
    main()
