"""Change modules in small ways, one at a time, and list the changes that no test notices: `make mutants`.

    python tests/scripts/mutants.py --python PYTHON [ROOM or MODULE ...]

A room is data, doctor, evaluation, inference or export; all of them without a name. cosmic-ray makes the changes, in a copy of
the repository in outputs/mutants/copy, so the files that you are editing stay as they are. A seeded sample of each module is
tried. `forked_tests.py` runs the tests that reach a changed line, in seconds.

A run that was stopped goes on where it was. A module that has changed begins again; if only its tests have changed, those changes
are tried again that no test had noticed. Survivors go to outputs/mutants/survivors.txt, counts to outputs/mutants/counts.json.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import WorkerOutcome, WorkItem, WorkResult

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "outputs/mutants"
COPY = OUTPUT / "copy"
SOURCE = Path("src/dino_hf")
ROOMS = {
    "data": ["data/*.py"],
    "doctor": ["doctor/*.py", "training/diagnosis.py", "cli/doctor.py", "cli/doctor_report.py"],
    "evaluation": ["evaluation/*.py"],
    "inference": ["inference/*.py"],
    "export": ["export/*.py"],
}
SKIPPED = "not in the sample"
# Types are no behaviour, and Python refuses most of their changes at import.
UNTRIED_OPERATORS = ("core/ReplaceBinaryOperator_BitOr_", "core/RemoveDecorator")


def modules(names: list[str]) -> list[Path]:
    found = []
    for name in names or ROOMS:
        if name in ROOMS:
            found += [file for pattern in ROOMS[name] for file in sorted((ROOT / SOURCE).glob(pattern))]
        elif (ROOT / name).is_file():
            found.append(ROOT / name)
        else:
            sys.exit(f"error: there is no room and no module {name!r}; rooms are {', '.join(ROOMS)}.")
    return [file.relative_to(ROOT) for file in found if file.name != "__init__.py"]


def tests_of(module: Path) -> list[str]:
    """Test files that import a module or bear its name; else those of the modules of its room that import it."""
    texts = {file: file.read_text(encoding="utf-8") for file in sorted((COPY / "tests").glob("test_*.py"))}
    found = _tests_naming(module, texts)
    if not found:
        is_used = re.compile(rf"^from \.({module.stem} import|  *import .*\b{module.stem}\b)", re.MULTILINE)
        room = sorted((COPY / module).parent.glob("*.py"))
        users = [file.relative_to(COPY) for file in room if is_used.search(file.read_text(encoding="utf-8"))]
        found = sorted({test for user in users for test in _tests_naming(user, texts)})
    return [file.relative_to(COPY).as_posix() for file in found]


def _tests_naming(module: Path, texts: dict[Path, str]) -> list[Path]:
    name, package = module.stem, module.parent.name
    imported = re.compile(rf"\b{package}(\.{name} import|  *import (\w+, )*{name}\b)|\bimport {name}\n")
    return [file for file, text in texts.items() if f"_{name}." in file.name or imported.search(text)]


def copy_repository() -> None:
    """What git knows or does not ignore; files that are the same stay, and others go."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    names = [name for name in names if name and (ROOT / name).is_file()]
    for old in [file for file in COPY.rglob("*") if file.is_file() and file.relative_to(COPY).as_posix() not in names]:
        old.unlink()
    for name in names:
        (COPY / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, COPY / name)


def compile_copy(python: str) -> None:
    """Python reads compiled files only as long as the hash of their source fits, so a changed module is compiled in each fork."""
    command = [python, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash", "src"]
    subprocess.run(command, cwd=COPY, check=True)


def digest(*files: Path) -> str:
    return hashlib.blake2b(b"\0".join(file.read_bytes() for file in files), digest_size=8).hexdigest()


@contextmanager
def test_server(python: str, folder: Path):
    """Socket of a `forked_tests.py` that runs in the copy."""
    socket = folder / "socket"  # in a short folder: the path of a socket has 100 bytes at most
    environment = os.environ | {
        "PYTHONPATH": str(COPY / "src"),
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    command = [python, "tests/scripts/forked_tests.py", "serve", str(socket)]
    with subprocess.Popen(command, cwd=COPY, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            if server.stdout.readline() != "ready\n":
                sys.exit("error: the process that runs the tests did not start.")
            yield socket
        finally:
            server.terminate()


def sample(database: WorkDB, text: str, count: int, seed: int) -> None:
    """Mark all changes but `count` as skipped. Changes of types and docstrings are never in the sample."""
    typed = set()
    for node in ast.walk(ast.parse(text)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if part is not None:
                typed |= {(part.lineno, column) for column in range(part.col_offset, part.end_col_offset)}

    def is_wanted(item: WorkItem) -> bool:
        (mutation,) = item.mutations
        return not mutation.operator_name.startswith(UNTRIED_OPERATORS) and mutation.start_pos not in typed

    def place(item: WorkItem) -> tuple:
        (mutation,) = item.mutations
        return mutation.start_pos, mutation.operator_name, mutation.occurrence

    items = sorted(database.work_items, key=place)
    wanted = [item for item in items if is_wanted(item)]
    chosen = {item.job_id for item in random.Random(seed).sample(wanted, min(count, len(wanted)))}
    skipped = WorkResult(worker_outcome=WorkerOutcome.SKIPPED, output=SKIPPED)
    database.set_multiple_results([item.job_id for item in items if item.job_id not in chosen], skipped)


def cosmic_ray(*arguments: str) -> str:
    command = [sys.executable, "-m", "cosmic_ray.cli", *arguments]
    done = subprocess.run(command, cwd=COPY, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: cosmic-ray {arguments[0]} failed: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def try_module(module: Path, socket: Path, folder: Path, count: int, seed: int) -> None:
    """Its sample; the results are in a database of cosmic-ray."""
    tests = tests_of(module)
    name = module.relative_to(SOURCE).with_suffix("").as_posix().replace("/", ".")
    print(f"{name}: {' '.join(tests) or 'no test names it'}", flush=True)
    if not tests:
        return
    version = digest(COPY / module)
    database, record = OUTPUT / f"{name}.{version}.{seed}.{count}.sqlite", OUTPUT / f"{name}.tests.json"
    for old in OUTPUT.glob(f"{name}.*.sqlite"):
        if old != database:
            old.unlink()
    request = {"module": module.as_posix(), "record": str(record), "folder": str(folder / "tests"), "tests": tests}
    request |= {"log": str(folder / "log"), "kind": "test"}
    ask = [sys.executable, "-S", str(COPY / "tests/scripts/forked_tests.py"), "ask", str(socket)]
    state = f"{version} {digest(*(COPY / test for test in tests))}"
    is_new = not record.is_file() or json.loads(record.read_text()).get("state") != state
    if is_new:
        if subprocess.run([*ask, json.dumps(request | {"kind": "measure"})]).returncode:
            print(f"  left out: no test passes; see {shutil.copyfile(folder / 'log', OUTPUT / f'{name}.log')}")
            return
        record.write_text(json.dumps(json.loads(record.read_text()) | {"state": state}))
    (folder / "request.json").write_text(json.dumps(request))
    command = " ".join([*ask, f"@{folder / 'request.json'}"])
    configuration = folder / "mutants.toml"
    configuration.write_text(
        f"[cosmic-ray]\nmodule-path = {json.dumps(module.as_posix())}\ntimeout = 600.0\nexcluded-modules = []\n"
        f'test-command = {json.dumps(command)}\n[cosmic-ray.distributor]\nname = "local"\n'
    )
    if not database.exists():
        new = database.with_suffix(".new")
        new.unlink(missing_ok=True)
        cosmic_ray("init", str(configuration), str(new))
        with use_db(str(new)) as work:
            sample(work, (COPY / module).read_text(encoding="utf-8"), count, seed)
        new.rename(database)
    elif is_new:
        forget_survivors(database)
    cosmic_ray("exec", str(configuration), str(database))
    tried, survivors = results(database)
    print(f"  {len(tried)} changes, {len(survivors)} survived", flush=True)


def forget_survivors(database: Path) -> None:
    """So that they are tried again; cosmic-ray has no call for it."""
    import sqlite3

    with sqlite3.connect(database) as connection:
        connection.execute("DELETE FROM work_results WHERE test_outcome = 'SURVIVED'")
    connection.close()


def results(database: Path) -> tuple[list, list]:
    """Return two lists of (work item, result): the changes that were tried, and the ones that no test noticed."""
    with use_db(str(database), WorkDB.Mode.open) as work:
        tried = [entry for entry in work.completed_work_items if entry[1].worker_outcome == WorkerOutcome.NORMAL]
    return tried, [entry for entry in tried if not entry[1].is_killed]


def report() -> None:
    counts, texts = {}, []
    for database in sorted(OUTPUT.glob("*.sqlite")):
        name = database.name.rsplit(".", 4)[0]
        tried, survivors = results(database)
        counts[name] = {"tried": len(tried), "killed": len(tried) - len(survivors), "survivors": len(survivors)}
        print(f"| {name} | {len(tried)} | {len(tried) - len(survivors)} | {len(survivors)} |")
        for item, result in sorted(survivors, key=lambda entry: entry[0].mutations[0].start_pos):
            lines = [line for line in result.diff.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
            texts.append("\n".join([f"{name}:{item.mutations[0].start_pos[0]}", *lines, ""]))
    (OUTPUT / "survivors.txt").write_text("\n".join(texts), encoding="utf-8")
    (OUTPUT / "counts.json").write_text(json.dumps(counts, indent=2), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="List small changes of modules that no test notices.")
    parser.add_argument(
        "names", nargs="*", help="rooms, or modules such as src/dino_hf/inference/tiling.py; default: all rooms"
    )
    parser.add_argument("--python", default=sys.executable, help="that has the package's dependencies")
    parser.add_argument("--count", type=int, default=40, help="changes of a module that are tried; default: 40")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    arguments = parser.parse_args()
    if not hasattr(os, "fork"):
        sys.exit("error: this system has no fork; run it on Linux or macOS.")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the process that runs the tests ends too
    chosen = modules(arguments.names)
    COPY.mkdir(parents=True, exist_ok=True)
    copy_repository()
    python = str(Path(arguments.python).absolute())  # not resolved: it is a link to a Python of another environment
    compile_copy(python)
    with tempfile.TemporaryDirectory() as folder, test_server(python, Path(folder)) as socket:
        for module in chosen:
            try_module(module, socket, Path(folder), arguments.count, arguments.seed)
    report()


if __name__ == "__main__":
    main()
