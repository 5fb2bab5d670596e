"""First use, a machine without a compiler, a home that cannot be written, and the command that tells about it."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from typer.testing import CliRunner

from dino_hf.cli import app as cli
from dino_hf.common.paths import NoCacheFolder
from dino_hf.model.attention_backends import BackendUnavailable
from dino_hf.runtime import kernel_loading
from helpers import needs_compiler

pytestmark = needs_compiler
needs_owners = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no owners and modes of this kind")
needs_shell = pytest.mark.skipif(sys.platform == "win32", reason="its compilers are shell scripts")

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
    assert "A slower backend is used" in chosen
    assert named.startswith("The ms_deform_attn backend 'cpu' cannot run here: there is no C++ compiler")


def test_a_cache_that_is_no_folder_is_a_reason_too(tmp_path):
    (tmp_path / "cache").write_text("a file")
    chosen, named = run(tmp_path)
    assert chosen.startswith("True 1 The ms_deform_attn backend 'cpu' cannot run here")
    assert "Not a directory" in named


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere, and so may Windows"
)
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


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Where the tests below may build what they like."""
    monkeypatch.setenv("DINO_HF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), OSError(errno.EROFS, "read-only")])
def test_a_home_that_cannot_be_written_builds_for_this_process(tmp_path, caplog, error, own_cache):
    """The same as above, whoever runs the tests."""
    folders = []

    class Builder:
        find_compiler = staticmethod(lambda: None)

        @staticmethod
        def build_variant(project, folder, native, mode, scratch=None):
            folders.append(folder)
            if len(folders) == 1:
                raise error
            return folder

    built = kernel_loading._build(Builder, tmp_path, "identity", native=False)
    assert built == folders[1] != folders[0]
    assert "set DINO_HF_CACHE" in caplog.text


def test_a_user_without_a_home_builds_for_this_process_too(tmp_path, monkeypatch, caplog):
    def homeless():
        raise NoCacheFolder("The home folder is unknown.")

    class Builder:
        build_variant = staticmethod(lambda project, folder, native, mode, scratch=None: folder)

    monkeypatch.setattr(kernel_loading, "cache_dir", homeless)
    assert kernel_loading._build(Builder, tmp_path, "identity", native=False).is_dir()
    assert "The home folder is unknown" in caplog.text


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
        assert "  triton      not available: there is no CUDA device" in result.output


@pytest.mark.parametrize(
    ("name", "reason"),
    [("evil", "There is no ms_deform_attn backend 'evil'; known are"), ("triton", "'triton' cannot run here: ")],
)
def test_a_variable_that_orders_what_cannot_run_is_one_sentence(monkeypatch, name, reason):
    if name == "triton" and torch.cuda.is_available():
        pytest.skip("it runs here")
    monkeypatch.setenv("DINO_HF_MS_DEFORM_ATTN", name)
    result = CliRunner().invoke(cli.app, ["env"])
    assert result.exit_code == 1
    lines = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert f"DINO_HF_MS_DEFORM_ATTN: The{'re' if name == 'evil' else ''} " in lines[0]
    assert reason in lines[0]
    assert "Traceback" not in result.output


def test_a_build_ahead_of_time_is_used_and_needs_no_compiler(tmp_path):
    """As in a container that has a compiler when it is made and none when it runs."""
    sources = tmp_path / "kernels"
    shutil.copytree(
        kernel_loading.kernel_sources(), sources, ignore=shutil.ignore_patterns("build", "__pycache__", "tests")
    )
    subprocess.run([sys.executable, sources / "build.py"], check=True, capture_output=True)
    use = (
        "import sys, torch, dino_hf; from pathlib import Path; from dino_hf.runtime import kernel_loading; "
        "kernel_loading.kernel_sources = lambda: Path(sys.argv[1]); "
        "print(kernel_loading.load_kernel(native=True).__file__)"
    )
    environment = {**os.environ, "DINO_HF_CACHE": str(tmp_path / "cache"), "PATH": "", "CXX": ""}
    done = subprocess.run([sys.executable, "-c", use, sources], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(sources / "ms-deform-attn/build/torch-stable-abi"))
    assert not (tmp_path / "cache").exists()


# -- The cache: whose it is, and whether it is whole


@pytest.fixture
def universal(own_cache, monkeypatch):
    """Loads the kernel without its compiled part, which takes no time to build, as a new process would."""
    builder = kernel_loading.kernel_builder()
    identity = builder.kernel_id(kernel_loading.kernel_sources() / kernel_loading.PROJECT, native=False)

    def load():
        for name in [name for name in sys.modules if name == identity or name.startswith(identity + ".")]:
            monkeypatch.delitem(sys.modules, name)
        return kernel_loading.load_kernel(native=False)

    return load


def built_folder(cache):
    return next(cache.glob("kernels/*/torch-universal"))


def test_folders_of_the_cache_are_private(universal, own_cache):
    """Whatever the umask is."""
    before = os.umask(0)
    try:
        universal()
    finally:
        os.umask(before)
    if sys.platform != "win32":
        for folder in [own_cache, *own_cache.rglob("*")]:
            assert folder.stat().st_mode & (0o077 if folder.is_dir() else 0o022) == 0, folder
    universal()  # and it is taken from there


@needs_owners
@pytest.mark.parametrize("where", ["cache", "kernels", "identity", "variant", "file"])
def test_code_that_others_may_have_written_is_not_run(universal, own_cache, where):
    universal()
    variant = built_folder(own_cache)
    places = {"cache": own_cache, "kernels": variant.parents[1], "identity": variant.parent, "variant": variant}
    place = places.get(where, variant / "_eager.py")
    place.chmod(place.stat().st_mode | 0o002)
    with pytest.raises(
        BackendUnavailable, match=r"not safe to run code from: other users may write to .*DINO_HF_CACHE"
    ):
        universal()
    place.chmod(place.stat().st_mode & ~0o002)
    universal()


@needs_owners
def test_nothing_is_built_where_others_may_write(universal, own_cache):
    own_cache.mkdir(mode=0o700)
    own_cache.chmod(0o777)
    with pytest.raises(BackendUnavailable, match="other users may write to"):
        universal()
    assert not list(own_cache.iterdir())


def damage_zeros(variant):
    content = (variant / "_eager.py").read_bytes()
    (variant / "_eager.py").write_bytes(bytes(100) + content[100:])


DAMAGES = {
    "zeros": damage_zeros,
    "another init": lambda variant: (variant / "__init__.py").write_text("raise RuntimeError"),
    "no id": lambda variant: (variant / "built.json").write_text('{"sizes": {}}'),
    "no json": lambda variant: (variant / "built.json").write_bytes(b"\xff\x00"),
    "a list": lambda variant: (variant / "built.json").write_text("[1]"),
    "deep": lambda variant: (variant / "built.json").write_text("[" * 50_000),
    "nothing is listed": lambda variant: (variant / "built.json").write_text('{"id": "x", "sizes": {}, "sha256": {}}'),
    "a folder": lambda variant: ((variant / "built.json").unlink(), (variant / "built.json").mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_build_is_made_again(universal, own_cache, damage):
    universal()
    variant = built_folder(own_cache)
    whole = {file.name: file.read_bytes() for file in variant.iterdir() if file.is_file()}
    DAMAGES[damage](variant)
    universal()
    assert {name: (variant / name).read_bytes() for name in whole} == whole


def test_a_build_that_is_whole_but_does_not_load_is_made_again_once(universal, own_cache, monkeypatch, caplog):
    universal()
    loaded, import_module, builder = [], kernel_loading._import, kernel_loading.kernel_builder()

    def fail_at_first(name, file):
        loaded.append(file)
        if len(loaded) == 1:
            raise ImportError("undefined symbol")
        return import_module(name, file)

    monkeypatch.setattr(kernel_loading, "_import", fail_at_first)
    monkeypatch.setattr(kernel_loading, "kernel_builder", lambda: builder)
    assert universal().ms_deform_attn
    assert len(loaded) == 2
    assert "does not load, so it is built again: ImportError: undefined symbol" in caplog.text


# -- Builds that fail


@pytest.fixture
def compiler(tmp_path, monkeypatch, own_cache):
    """Loads the compiled kernel with a compiler of the test, a shell script that notes its calls."""
    calls, script = tmp_path / "calls", tmp_path / "c++"
    monkeypatch.setenv("CXX", str(script))
    builder = kernel_loading.kernel_builder()
    identity = builder.kernel_id(kernel_loading.kernel_sources() / kernel_loading.PROJECT, native=True)

    def load(body):
        if body is not None:
            script.write_text(f"#!/bin/sh\necho call >> {calls}\n{body}\n")
            script.chmod(0o755)
        calls.write_text("")
        for name in [name for name in sys.modules if name == identity or name.startswith(identity + ".")]:
            monkeypatch.delitem(sys.modules, name)
        with pytest.raises(BackendUnavailable) as caught:
            kernel_loading.load_kernel(native=True)
        return str(caught.value), calls.read_text().count("call")

    return load


USELESS = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo garbage > "$2"; shift; done'


@needs_shell
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'op.cpp:1: error: out of ideas'; exit 3", "failed .*exit 3.: op.cpp:1: error: out of ideas"),
        ("printf '\\344 error: \\344\\033[31m'; exit 1", "error: \ufffd .31m"),
        ("exit 0", "reported success and wrote no library"),
        (USELESS, "it was built, but does not load: OSError"),
    ],
    ids=["an error", "an error in Latin-1", "no library", "a useless library"],
)
def test_a_build_that_failed_is_not_repeated_by_every_process(compiler, own_cache, body, reason):
    first, num_calls = compiler(body)
    assert num_calls > 0
    assert re.search(reason, first)
    assert [path.suffix for path in own_cache.rglob("*") if path.is_file()] == [".json"]
    second, num_calls = compiler(None)
    assert num_calls == 0
    assert second.startswith(first)
    assert "tried 0.0 hours ago; delete " in second
    third, num_calls = compiler(body + "\n# another version")
    assert num_calls > 0
    assert third == first


@needs_shell
@pytest.mark.parametrize("body", ["echo 'as: No space left on device'; exit 1", "kill -9 $$"], ids=["full", "killed"])
def test_a_failure_that_may_be_over_is_tried_again(compiler, body):
    for _ in range(2):
        _, num_calls = compiler(body)
        assert num_calls > 0


@needs_shell
def test_a_failure_is_forgotten_after_a_day(compiler, own_cache, monkeypatch):
    compiler("exit 0")
    day = kernel_loading.FAILURE_HOURS * 3600
    now = kernel_loading.time.time()
    monkeypatch.setattr(kernel_loading.time, "time", lambda: now + day - 60)
    assert compiler(None)[1] == 0
    monkeypatch.setattr(kernel_loading.time, "time", lambda: now + day + 60)
    assert compiler(None)[1] > 0


@pytest.mark.skipif(sys.platform == "win32", reason="no modes of files")
def test_a_note_of_a_failure_is_private_and_written_in_one_step(tmp_path):
    folder = tmp_path / "kernel"
    kernel_loading._remember_failure(folder, "gcc 12", "no compiler")
    (file,) = tmp_path.iterdir()
    assert file.name == "kernel.failed.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert kernel_loading._remembered_failure(folder, "gcc 12").startswith("no compiler")


@needs_shell
@pytest.mark.parametrize("text", ["", "[]", '{"time": "now"}', "[" * 50_000])
def test_a_damaged_note_of_a_failure_means_nothing(compiler, own_cache, text):
    compiler("exit 0")
    next(own_cache.rglob("*.failed.json")).write_text(text)
    assert compiler(None)[1] > 0


@needs_shell
def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(compiler, own_cache, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(kernel_loading.kernel_builder(), "COMPILER_SECONDS", 1)
    reason, _ = compiler(f"sleep 300 & echo $! >> {tmp_path / 'pids'}; wait")
    assert "did not finish in 1 s" in reason
    assert (
        "Building the deformable attention kernel" in caplog.text
    )  # before the pause, and not only in a log of details
    assert caplog.records[0].levelname == "WARNING"
    assert_all_ended(tmp_path / "pids")
    assert [path.suffix for path in own_cache.rglob("*") if path.is_file()] == [".json"]


def assert_all_ended(file):
    pids = [int(line) for line in file.read_text().split()]
    assert pids
    for pid in pids:
        for _ in range(100):
            if not is_running(pid):
                break
            time.sleep(0.05)
        assert not is_running(pid)


def is_running(pid: int) -> bool:
    """A process that has ended and that no one has waited for does not count."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@needs_shell
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL] if hasattr(signal, "SIGKILL") else [])
def test_compilers_and_scratch_end_with_the_process(tmp_path, number):
    script, pids, cache = tmp_path / "c++", tmp_path / "pids", tmp_path / "cache"
    script.write_text(f"#!/bin/sh\nsleep 300 & echo $! >> {pids}; wait\n")
    script.chmod(0o755)
    code = f"""
import sys
from pathlib import Path
from importlib import util
spec = util.spec_from_file_location("build", {str(kernel_loading.kernel_sources() / "build.py")!r})
build = util.module_from_spec(spec)
spec.loader.exec_module(build)
project = Path({str(kernel_loading.kernel_sources() / kernel_loading.PROJECT)!r})
build.build_variant(project, Path({str(cache)!r}), native=True)
"""
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "CXX": str(script)})
    try:
        for _ in range(600):
            if pids.exists() and len(pids.read_text().split()) == 4:
                break
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(timeout=20)
        assert_all_ended(pids)
        for _ in range(100):
            if not list(cache.iterdir()):
                break
            time.sleep(0.05)
        assert not list(cache.iterdir())
    finally:
        process.kill()
        process.wait()


def test_scratch_of_builds_that_were_killed_goes(universal, own_cache, monkeypatch):
    universal()
    folder = built_folder(own_cache).parent
    old, fresh = folder / ".torch-universal.old", folder / ".torch-universal.fresh"
    for path in (old, fresh):
        path.mkdir()
    hours = kernel_loading.kernel_builder()._ABANDONED_SECONDS
    os.utime(old, (time.time() - hours - 60,) * 2)
    os.utime(fresh, (time.time() - hours + 60,) * 2)
    (built_folder(own_cache) / "built.json").unlink()
    universal()
    assert not old.exists()
    assert fresh.exists()


BUILD_AND_DIE = """
import os, signal, sys, time
from dino_hf.runtime import kernel_loading
builder = kernel_loading.kernel_builder()
def die(*arguments):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "temporary":
    kernel_loading.make_private = lambda folder: (_ for _ in ()).throw(PermissionError(13, "denied"))
    kernel_loading.new_scratch, make = lambda path: [make(path), die()], kernel_loading.new_scratch
elif sys.argv[1] == "build":
    builder._ops_source = die
else:
    builder._ops_source = lambda *_: (_ for _ in ()).throw(builder.BuildError("no", is_lasting=True))
    kernel_loading.json.dumps = die
kernel_loading.load_kernel(native=False)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
@pytest.mark.parametrize("when", ["build", "note", "temporary"])
def test_what_a_killed_process_leaves_goes_at_the_next_start(
    universal, own_cache, tmp_path, monkeypatch, when, request
):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(kernel_loading.tempfile, "tempdir", None)
    request.addfinalizer(lambda: setattr(kernel_loading.tempfile, "tempdir", None))
    killed = subprocess.run([sys.executable, "-c", BUILD_AND_DIE, when])
    assert killed.returncode == -signal.SIGKILL

    def leftovers():
        return [path for folder in (own_cache, temporary) if folder.exists() for path in folder.rglob("*.partial*")]

    assert leftovers()
    if when == "temporary":
        monkeypatch.setattr(kernel_loading, "cache_dir", lambda: (_ for _ in ()).throw(NoCacheFolder("no home")))
        atexit_calls = []
        monkeypatch.setattr(
            kernel_loading.atexit, "register", lambda *call, **settings: atexit_calls.append((call, settings))
        )
        before = leftovers()
        universal()
        assert not any(path.exists() for path in before)
        [((function, folder), settings)] = atexit_calls
        function(folder, **settings)
    else:
        universal()
    assert leftovers() == []


# -- Other systems


def test_the_cache_tells_c_libraries_apart(own_cache, monkeypatch):
    names = set()
    for libc, machine in ((("glibc", "2.36"), ""), (("glibc", "2.28"), ""), (("", ""), "x86_64-pc-linux-musl")):
        monkeypatch.setattr(kernel_loading.sys, "platform", "linux")
        monkeypatch.setattr(kernel_loading.platform, "libc_ver", lambda libc=libc: libc)
        monkeypatch.setattr(kernel_loading.sysconfig, "get_config_var", lambda name, machine=machine: machine)
        names.add(kernel_loading._cache_folder("identity").name)
    assert len(names) == 3
    assert any(name.endswith("-musl") for name in names)
    monkeypatch.setattr(kernel_loading.sys, "platform", "darwin")
    assert kernel_loading._cache_folder("identity").name.endswith("-darwin")


def test_windows_has_no_owners_and_no_kernel(universal, own_cache, monkeypatch):
    for name in ("geteuid", "getuid"):
        monkeypatch.delattr(os, name, raising=False)
    universal()
    own_cache.chmod(0o777)
    universal()
    builder = kernel_loading.kernel_builder()
    monkeypatch.setattr(builder.platform, "system", lambda: "Windows")
    with pytest.raises(builder.BuildError, match="not made for Windows"):
        kernel_loading._load_or_build(builder, kernel_loading.kernel_sources() / "ms-deform-attn", "identity", True)


@pytest.mark.parametrize(
    ("capability", "hip", "reason"),
    [
        ((7, 0), None, "Old GPU has compute capability 7.0, and the kernel needs 7.5"),
        ((7, 4), None, "needs 7.5"),
        ((7, 5), None, None),
        ((9, 0), None, None),
        ((6, 1), "6.4", None),
    ],
)
def test_old_gpus_are_named(monkeypatch, capability, hip, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    monkeypatch.setattr(torch.version, "hip", hip)
    found = kernel_loading._triton_obstacle(torch.device("cuda", 1))
    assert found is None if reason is None else reason in found
