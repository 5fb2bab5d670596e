"""Change a module in every small way, one at a time, and list the changes that no test notices: `make mutants`.

    python tests/scripts/mutants.py SCRATCH MODULE [TESTS ...]

It works in SCRATCH, a copy of the repository, so the files that you are editing stay as they are. TESTS default to the test
files that name the module. Survivors go to outputs/mutants/<module>.txt.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def tests_of(module: Path) -> list[str]:
    """Test files that import a module, or a name from it, by its dotted name or from its package."""
    name, package = module.stem, module.parent.name
    found = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        text = file.read_text(encoding="utf-8")
        if f"{package}.{name} import" in text or f"{package} import {name}" in text or f"import {name}\n" in text:
            found.append(str(file.relative_to(ROOT)))
    return found or [str(file.relative_to(ROOT)) for file in sorted((ROOT / "tests").glob(f"test_*{name}*.py"))]


def copy_repository(scratch: Path) -> None:
    """What git knows or does not ignore."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, scratch / name)


def configuration(module: Path, tests: list[str], python: str, seconds: float) -> str:
    """Of cosmic-ray. A test run that takes `seconds` is taken for one that found the change."""
    command = f"{python} -m pytest -x -q -m 'not slow' -p no:cacheprovider {' '.join(tests)}"
    return f"""
[cosmic-ray]
module-path = {json.dumps(module.as_posix())}
timeout = {seconds}
excluded-modules = []
test-command = {json.dumps(command)}

[cosmic-ray.distributor]
name = "local"
"""


def survivors(report: str) -> list[str]:
    """The diffs of `cosmic-ray dump` lines whose outcome is "survived"."""
    found = []
    for line in report.splitlines():
        item, result = json.loads(line)
        if result and result.get("test_outcome") == "survived":
            mutation = item["mutations"][0]
            found.append(f"{mutation['operator_name']}, {mutation['occurrence']}\n{result.get('diff', '')}\n")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="List the changes of a module that no test notices.")
    parser.add_argument("scratch", type=Path, help="folder for the copy; made, and deleted at the end")
    parser.add_argument("module", type=Path, help="such as src/dino_hf/inference/tiling.py")
    parser.add_argument("tests", nargs="*", help="default: the test files that name the module")
    parser.add_argument("--python", default=sys.executable, help="that has the package's dependencies")
    parser.add_argument("--seconds", type=float, default=300, help="limit of one run of the tests")
    arguments = parser.parse_args()
    if not (ROOT / arguments.module).is_file():
        sys.exit(f"error: there is no module {arguments.module}; name it as src/dino_hf/inference/tiling.py.")
    tests = arguments.tests or tests_of(arguments.module)
    if not tests:
        sys.exit(f"error: no test file names {arguments.module}; name some after it.")
    print(f"{arguments.module}: {' '.join(tests)}", flush=True)
    scratch = arguments.scratch.resolve()
    scratch.mkdir(parents=True)
    try:
        copy_repository(scratch)
        python = str(Path(arguments.python).absolute())  # not resolved: it is a link to a Python of another environment
        (scratch / "mutants.toml").write_text(configuration(arguments.module, tests, python, arguments.seconds))
        environment = os.environ | {
            "PYTHONPATH": str(scratch / "src"),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

        def cosmic_ray(*command: str) -> str:
            done = subprocess.run(
                [sys.executable, "-m", "cosmic_ray.cli", *command],
                cwd=scratch,
                env=environment,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(f"error: cosmic-ray {command[0]} failed: {(done.stderr or done.stdout)[-2000:]}")
            return done.stdout

        cosmic_ray("baseline", "mutants.toml")
        cosmic_ray("init", "mutants.toml", "mutants.sqlite")
        cosmic_ray("exec", "mutants.toml", "mutants.sqlite")
        report = cosmic_ray("dump", "mutants.sqlite")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    found = survivors(report)
    output = ROOT / "outputs/mutants" / f"{arguments.module.stem}.txt"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(found), encoding="utf-8")
    print(f"{len(found)} of {len(report.splitlines())} changes survived; written to {output.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
