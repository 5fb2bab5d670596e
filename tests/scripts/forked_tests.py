"""Run tests in forks of one process that has already imported the large packages, so that a run takes seconds.

    python tests/scripts/forked_tests.py serve SOCKET       # in the folder of the tests; prints "ready"
    python -S tests/scripts/forked_tests.py ask SOCKET JSON   # or @FILE of JSON; exit status 0: the tests pass

`mutants.py` starts the server and lets cosmic-ray ask it. A request names a module and the test files. "measure" runs all the
tests and notes which lines of the module each one runs. "test" runs only the tests that reach the lines that have changed since.
"""

import ast
import contextlib
import json
import os
import signal
import sys
from multiprocessing.connection import Client, Listener
from pathlib import Path

MEMORY = 6 * 2**30  # bytes that one run may allocate: a change may ask for any number
LONGEST_TEST = 10.0  # seconds; a slower test is not run for a change
LONGEST_RUN = 40.0  # seconds of tests for one change, the fastest ones first


class Measure:
    """A plugin of pytest: seconds, and lines of one module, of each test that passes."""

    def __init__(self, module: Path):
        self.file = str(module)
        self.lines = set()
        self.tests = {}  # node id -> [seconds, lines]
        self.of_fixtures = {}  # file -> lines; a fixture may be for all tests of its file

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename != self.file:
            return None
        self.lines.add(frame.f_lineno)
        return self.trace

    def pytest_runtest_logreport(self, report):
        seconds, lines = self.tests.get(report.nodeid, (0.0, []))
        if report.failed or report.skipped:
            self.tests[report.nodeid] = (float("inf"), [])
        else:
            self.tests[report.nodeid] = (seconds + report.duration, sorted({*lines, *self.lines}))
        if report.when == "setup":
            self.of_fixtures.setdefault(report.nodeid.split("::")[0], set()).update(self.lines)
        if report.when == "teardown":
            self.lines.clear()


class Choose:
    """A plugin of pytest: only some tests, the fastest first."""

    def __init__(self, chosen: list[str]):
        self.order = {name: place for place, name in enumerate(chosen)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted(
            (item for item in items if item.nodeid in self.order), key=lambda item: self.order[item.nodeid]
        )


def measure(module: Path, arguments: list[str]) -> dict[str, tuple[float, list[int]]]:
    import threading

    import pytest

    plugin = Measure(module)
    threading.settrace(plugin.trace)
    sys.settrace(plugin.trace)
    pytest.main(arguments, plugins=[plugin])
    sys.settrace(None)
    return {
        name: (seconds, sorted({*lines, *plugin.of_fixtures[name.split("::")[0]]}))
        for name, (seconds, lines) in plugin.tests.items()
        if seconds < float("inf")
    }


def statements(tree: ast.Module) -> list[range]:
    """Lines of each statement and each `except`; of a compound one, those before its body."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt | ast.excepthandler):
            body = getattr(node, "body", None)
            end = max(body[0].lineno, node.lineno + 1) if body else node.end_lineno + 1
            found.append(range(node.lineno, end))
    return found


def choose(before: str, after: str, tests: dict[str, tuple[float, list[int]]]) -> list[str]:
    """Tests that reach a changed line, the fastest ones first, up to the limits."""
    old, new = before.splitlines(), after.splitlines()
    same = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    tail = next((n for n, (a, b) in enumerate(zip(old[::-1], new[::-1], strict=False)) if a != b), 0)
    tree = ast.parse(before)
    lines_of = statements(tree)
    changed = set(range(same + 1, len(old) - tail + 1))
    lines = {line for some in lines_of if changed & set(some) for line in some}
    for node in tree.body:
        if changed & set(range(node.lineno, node.end_lineno + 1)) and isinstance(node, ast.Assign):
            private = [name.id for name in node.targets if isinstance(name, ast.Name) and name.id.startswith("_")]
            if private:  # a constant of this module decides where its name stands
                uses = {n.lineno for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in private}
                uses -= set(range(node.lineno, node.end_lineno + 1))
                lines = {line for some in lines_of if uses & set(some) for line in some}
    # Statements outside functions, and the heads of functions, run at import: they matter to every test.
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    at_import = bool(lines - {n for f in functions for n in range(f.body[0].lineno, f.end_lineno + 1)})
    chosen, total = [], 0.0
    for name, (seconds, reached) in sorted(tests.items(), key=lambda entry: entry[1][0]):
        if seconds <= LONGEST_TEST and total + seconds <= LONGEST_RUN and (at_import or lines & set(reached)):
            chosen.append(name)
            total += seconds
    return chosen


def run(request: dict) -> int:
    """In the fork. 0 if the tests pass or there are none."""
    import resource

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    module, record = Path(request["module"]).absolute(), Path(request["record"])
    options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "--basetemp", request["folder"]]
    if request["kind"] == "measure":
        signal.alarm(1800)
        tests = measure(module, [option for option in options if option != "-x"] + request["tests"])
        record.write_text(json.dumps({"text": module.read_text(encoding="utf-8"), "tests": tests}), encoding="utf-8")
        return 0 if tests else 1
    import pytest

    known = json.loads(record.read_text(encoding="utf-8"))
    chosen = choose(known["text"], module.read_text(encoding="utf-8"), known["tests"])
    if not chosen:
        return 0
    signal.alarm(60 + 5 * int(sum(known["tests"][name][0] for name in chosen)))  # ends the fork: the change was noticed
    files = sorted({name.split("::")[0] for name in chosen})
    return int(pytest.main(options + files, plugins=[Choose(chosen)]))


def import_packages() -> None:
    """All modules that ours import, but none of ours: those are read in each fork."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        names = set()
        for file in sorted(Path("src/dino_hf").rglob("*.py")):
            if file.name != "__main__.py":
                name = ".".join(file.relative_to("src").with_suffix("").parts).removesuffix(".__init__")
                with contextlib.suppress(ImportError):
                    __import__(name)
        names = [name for name in sys.modules if not name.startswith("dino_hf") and name != "__main__"]
        with os.fdopen(writer, "w") as file:
            json.dump(names, file)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        names = json.load(file)
    os.wait()
    for name in [*names, "pytest", "_pytest.assertion.rewrite"]:
        try:
            __import__(name)
        except Exception as error:  # some modules of other packages can only be imported by their package
            print(f"not imported beforehand: {name}: {error}", file=sys.stderr)


def serve(socket: str) -> None:
    import_packages()
    with Listener(socket, "AF_UNIX") as listener:
        print("ready", flush=True)
        while True:
            with listener.accept() as client:
                try:
                    request = json.loads(client.recv_bytes())
                except (EOFError, ConnectionError):  # the client was stopped
                    continue
                child = os.fork()
                if child == 0:
                    os.setsid()
                    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                    os.dup2(log, 1)
                    os.dup2(log, 2)
                    status = 1
                    try:
                        status = run(request)
                    finally:
                        sys.stdout.flush()
                        os._exit(status)
                _, status = os.waitpid(child, 0)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)  # processes that a test has started and left
                with contextlib.suppress(ConnectionError):  # the client was stopped
                    client.send_bytes(json.dumps(os.waitstatus_to_exitcode(status)).encode())


def ask(socket: str, request: str) -> int:
    if request.startswith("@"):
        request = Path(request[1:]).read_text(encoding="utf-8")
    try:
        with Client(socket, "AF_UNIX") as server:
            server.send_bytes(request.encode())
            return json.loads(server.recv_bytes())
    except (OSError, EOFError):
        os.kill(os.getppid(), signal.SIGTERM)  # or cosmic-ray would take a server that has ended for a test that fails
        raise


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[2], sys.argv[3]) and 1)
