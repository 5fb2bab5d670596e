"""Builds the kernel projects in this folder without kernel-builder.

It needs Python, torch and, for the CPU kernel, a C++ compiler.

    python kernels/build.py                       all projects, into kernels/<project>/build
    python kernels/build.py --output-dir DIR      one folder for each project in DIR

`kernels.get_local_kernel` loads the results. `torch-universal` holds Python files only. `torch-stable-abi...` also
holds the compiled CPU kernel, for every torch from the version in build.toml on. dino_hf calls `build_variant` on first
use.
"""

import argparse
import functools
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import stat
import sys
import tempfile
import time
import tomllib
from pathlib import Path
from types import ModuleType

import torch

_BUILT = "built.json"  # record of a build: its id, and the sizes and digests of its files
COMPILER_SECONDS = 300  # limit for a compiler that hangs; the four files take 15 seconds on a free core
_LARGEST_RECORD = 100_000  # bytes of built.json
_ABANDONED_SECONDS = 6 * 3600  # age of a scratch folder that no build can be using any more


class BuildError(Exception):
    """A kernel cannot be built. The message gives the reason in one sentence.

    Args:
        is_lasting: whether the same compiler would fail again with the same sources.
    """

    def __init__(self, sentence: str, is_lasting: bool = False):
        super().__init__(sentence)
        self.is_lasting = is_lasting


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
    """Name of a build in the format of the kernels library; it says where the build runs.

    With a CUDA build of torch, the kernels library expects a CUDA variant even without a GPU. So the name follows the
    build of torch.
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
    """Name of the module and of its operators' namespace. Only equal sources have equal names."""
    digest = hashlib.sha256()
    for file in sorted(_sources(project)):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(project).as_posix()} {len(content)}\n".encode() + content)
    for file in (Path(__file__), Path(__file__).with_name("compiling.py")):
        digest.update(file.read_bytes())
    name = read_settings(project)["general"]["name"].replace("-", "_")
    return f"_{name}_{'native' if native else 'universal'}_{digest.hexdigest()[:12]}"


def _python_package(project: Path) -> Path:
    return project / "torch-ext" / read_settings(project)["general"]["name"].replace("-", "_")


def _sources(project: Path) -> list[Path]:
    files = [project / "build.toml", *_python_package(project).glob("*.py")]
    return files + [project / name for name in read_settings(project)["torch"]["src"]]


def find_variant(project: Path, output_dir: Path, native: bool) -> Path | None:
    """The folder of a variant in `output_dir` if it was built from the current sources, otherwise None."""
    variant = output_dir / variant_name(project, native)
    return variant if _is_current(variant, kernel_id(project, native)) else None


def build_variant(
    project: Path, output_dir: Path, native: bool, mode: int = 0o755, scratch: Path | None = None
) -> Path:
    """Build a variant into `output_dir`, unless it is there already.

    Several processes may call this at once. Each builds in its own folder, and the first to finish moves it into place.

    Args:
        project: folder with build.toml.
        output_dir: folder that gets `<variant name>/`.
        native: compile the C++ kernel; else Python only.
        mode: of the folder.
        scratch: empty folder on the disk of `output_dir` to build in; it is moved or deleted. None: a new one in `output_dir`.
    Returns:
        the variant's folder.
    Raises:
        BuildError: there is no compiler, or it reports an error.
        OSError: the folder cannot be written.
    """
    if found := find_variant(project, output_dir, native):
        return found
    identity = kernel_id(project, native)
    target = output_dir / variant_name(project, native)
    output_dir.mkdir(parents=True, exist_ok=True)
    _delete_abandoned(output_dir)
    scratch = scratch or Path(tempfile.mkdtemp(dir=output_dir, prefix=f".{target.name}."))
    try:
        for file in _python_package(project).glob("*.py"):
            shutil.copyfile(file, scratch / file.name)
        (scratch / "_ops.py").write_text(_ops_source(identity, native), encoding="utf-8")
        (scratch / "metadata.json").write_text(_metadata(project, identity), encoding="utf-8")
        if native:
            compile_library(project, scratch / f"{identity}.abi3.so", identity)
        files = sorted(scratch.iterdir())
        sizes = {file.name: file.stat().st_size for file in files}
        digests = {file.name: _digest(file) for file in files}
        content = {"id": identity, "sizes": sizes, "sha256": digests}
        (scratch / _BUILT).write_text(json.dumps(content), encoding="utf-8")
        for file in scratch.iterdir():  # the umask may let other users write to files, but they must not
            file.chmod(0o755 if file.suffix == ".so" else 0o644)
        scratch.chmod(mode)
        if target.exists() and not _is_current(target, identity):
            shutil.rmtree(target)  # damaged, or of older sources
        try:
            scratch.replace(target)
        except OSError:
            if not _is_current(target, identity):  # else another process was first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _delete_abandoned(output_dir: Path) -> None:
    """Delete scratch folders of builds that were killed."""
    for folder in output_dir.glob(".torch-*"):
        try:
            is_old = time.time() - folder.lstat().st_mtime > _ABANDONED_SECONDS
        except OSError:  # another process was first
            continue
        if is_old and folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)


def _is_current(variant: Path, identity: str) -> bool:
    """Whether a build is complete and was made from these sources.

    The digests of all files are compared: a crash or a full disk may have left zeros in a library, and loading such a
    library can end the process.
    """
    try:
        if not stat.S_ISREG((variant / _BUILT).lstat().st_mode):
            return False
        with (variant / _BUILT).open("rb") as file:
            built = json.loads(file.read(_LARGEST_RECORD))
        return (
            built["id"] == identity
            and {"__init__.py", "_ops.py"} <= set(built["sha256"])
            and all((variant / name).stat().st_size == size for name, size in built["sizes"].items())
            and all(_digest(variant / name) == digest for name, digest in built["sha256"].items())
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _digest(file: Path) -> str:
    if not stat.S_ISREG(file.lstat().st_mode):
        raise ValueError(f"{file} is no file")
    return hashlib.sha256(file.read_bytes()).hexdigest()


def compiler_state() -> str:
    """Digest of the compiler that `find_compiler` finds. If it has changed, a failed build is tried again."""
    parts = find_compiler() or []
    for part in parts[:2]:  # a wrapper such as ccache names the compiler second
        if path := shutil.which(part):
            about = os.stat(path)
            parts = [*parts, os.path.realpath(path), str(about.st_size), str(about.st_mtime_ns)]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogateescape")).hexdigest()


def compile_library(project: Path, library: Path, namespace: str) -> None:
    """Compile the C++ sources of build.toml in parallel, into one shared library."""
    if platform.system() == "Windows":
        raise BuildError("the C++ kernel is not made for Windows, where torch wants Microsoft's compiler")
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
    scratch = library.parent
    objects = [scratch / f"{source.stem}.o" for source in sources]
    commands = [
        [*compiler, *flags, "-c", str(source), "-o", str(output)]
        for source, output in zip(sources, objects, strict=True)
    ]
    _run(commands, scratch)
    # Otherwise GCC makes symbols unique in the process, so two versions of the kernel could not be loaded.
    unique = ["-fno-gnu-unique"] if _is_gcc(compiler, scratch) else []
    undefined = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
    libraries = [f"-L{root / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    _run([[*compiler, "-shared", *unique, *undefined, *map(str, objects), "-o", str(library), *libraries]], scratch)
    if not library.is_file():
        raise BuildError(f"the C++ compiler ({compiler[0]}) reported success and wrote no library", is_lasting=True)
    for file in objects:
        file.unlink(missing_ok=True)


def _is_gcc(compiler: list[str], scratch: Path) -> bool:
    return "Free Software Foundation" in _run([[*compiler, "--version"]], scratch)[0]


def _run(commands: list[list[str]], scratch: Path) -> list[str]:
    """Run the commands and return what the compiler printed for each."""
    results = _compiling().run_commands(commands, COMPILER_SECONDS, str(scratch))
    for command, result in zip(commands, results, strict=True):
        name, code, output = command[0], result["code"], result["output"]
        if code is None:
            raise BuildError(f"the C++ compiler ({name}) did not finish in {COMPILER_SECONDS} s", is_lasting=True)
        if code:
            printable = re.sub(r"[^\x20-\x7e\n\u00a0-\ud7ff\ufffd]", " ", output)
            first = next((line for line in printable.splitlines() if "error:" in line), printable.strip()[-300:])
            # The compiler was killed, or the disk is full: the next try may succeed.
            is_lasting = code > 0 and "No space left" not in output
            sentence = f"the C++ compiler failed ({name}, exit {code}): {first.strip()[:300]}"
            raise BuildError(" ".join(sentence.split()), is_lasting)
    return [result["output"] for result in results]


@functools.cache
def _compiling() -> ModuleType:
    """Import compiling.py from the folder of this file. This file may run as a script, or be a module of any name."""
    file = Path(__file__).with_name("compiling.py")
    spec = importlib.util.spec_from_file_location("_dino_hf_compiling", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    # The kernels library has no "universal" backend, so the build with only Python files states "cpu".
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
