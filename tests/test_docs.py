"""The code of README and docs works: Python is run on toy stand-ins, commands are parsed and, in slow tests, run at toy size.

A block that needs a GPU, the network or hours stands below `<!-- test: parse (reason) -->`. Its Python is compiled, its commands
are parsed.
"""

import ast
import importlib
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import dino_hf
from data_layouts import draw_splits, write_coco, write_hub
from dino_hf.cli.app import app
from dino_hf.common.scenes import draw_data
from dino_hf.conversion import convert_checkpoint, verify_conversion
from dino_hf.inference import loading
from dino_hf.training import Recipe
from inference_toys import noise, save_toy_detector

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
BLOCK = re.compile(
    r"(?:<!-- test: parse \((?P<reason>[^)]+)\) -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S
)
# Pages whose blocks are only parsed: a dated record of what was run once, and fragments that refer to a text around them.
PARSED_PAGES = {"log.md", "commands.md", "CONTRIBUTING.md"}
# Pages whose code trains or exports a model, or runs several commands.
SLOW_PYTHON = {"quickstart.md", "finetune.md", "training.md", "export.md", "evaluate.md", "speed.md"}
COMMANDS = typer.main.get_command(app).commands
# What makes a documented command short.
TOY_OPTIONS = {
    "scenes": ["--num-train", "6", "--num-validation", "4"],
    "train": ["--max-steps", "2", "--report-to", "none", "--use-cpu", "true"],
    "eval": ["--num-bootstrap", "40"],
    "predict": ["--max-detections", "5"],
}


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    code: str
    reason: str | None  # why it is only parsed


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start("code")), found["language"], found["code"], found["reason"])
        for found in BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def runs(block: Block) -> bool:
    return block.reason is None and block.page.name not in PARSED_PAGES


def pages_with(language: str, slow_names: set[str]) -> list:
    pages = {block.page: None for block in BLOCKS if block.language == language and runs(block)}
    return [
        pytest.param(page, id=name_of(page), marks=[pytest.mark.slow] if page.name in slow_names else [])
        for page in pages
    ]


def of_language(language: str) -> list:
    return [pytest.param(one, id=f"{name_of(one.page)}:{one.line}") for one in BLOCKS if one.language == language]


def commands_of(code: str) -> list[list[str]]:
    """Words of each command of a bash block, without comments and environment variables."""
    commands = []
    for line in re.sub(r"\\\n", " ", code).splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while command and re.fullmatch(r"\w+=.*", command[0]):
                command = command[1:]
            commands.append(command)
    return commands


# ---- what the pages talk about, at toy size


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> Path:
    """A folder with the weights, data and pictures that the pages name."""
    folder = tmp_path_factory.mktemp("stand_ins")
    splits = draw_splits(folder / "drawn", train=6, validation=4, test=4)
    write_coco(splits, folder / "my-data")
    write_hub({name: splits[name] for name in ("train", "validation")}, folder / "hub-data")
    draw_data(folder / "scenes", 6, 4)
    for split, name in (("train", "train"), ("validation", "eval")):
        shutil.copytree(folder / "scenes" / split, folder / "data" / name)
    save_toy_detector(folder / "dino-r50-4scale")
    save_toy_detector(folder / "outputs" / "birds")
    (folder / "photos").mkdir()
    (folder / "more" / "2024").mkdir(parents=True)
    for index, path in enumerate(("street.jpg", "square.jpg", "photo.jpg", "photos/one.jpg", "more/2024/two.jpg")):
        noise(90 + 10 * index, 70 + 4 * index).save(folder / path)
    return folder


@pytest.fixture
def desk(stand_ins, tmp_path, monkeypatch) -> Path:
    """A working directory of its own with the stand-ins; recipes end after two steps."""
    shutil.copytree(stand_ins, tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")
    training_arguments = Recipe.training_arguments

    def two_steps(recipe, output_dir, **settings):
        return training_arguments(
            recipe, output_dir, **{"report_to": "none", "use_cpu": True} | settings | {"max_steps": 2}
        )

    monkeypatch.setattr(Recipe, "training_arguments", two_steps)
    # Names of published checkpoints find a stand-in instead of a download.
    monkeypatch.setattr(loading, "fetch", lambda name, mirror=None: tmp_path / "desk" / "dino-r50-4scale")
    return tmp_path / "desk"


# ---- Python


@pytest.mark.parametrize("page", pages_with("python", SLOW_PYTHON))
def test_the_python_of_a_page_runs(page, desk):
    """Blocks of a page share their variables, as for a reader who runs one after another."""
    names = {}
    for block in blocks_of(page):
        if block.language == "python" and runs(block):
            if "InferenceSession" in block.code:
                continue  # tests/test_export.py runs it, and compares its detections with the model's
            exec(compile(block.code, f"{name_of(page)}:{block.line}", "exec"), names)


@pytest.mark.parametrize("block", of_language("python"))
def test_python_compiles_and_names_public_things(block):
    tree = ast.parse(block.code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dino_hf":
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dino_hf":
            assert hasattr(dino_hf, node.attr), f"dino_hf.{node.attr}"


def test_stand_ins_of_blocks_that_run_are_not_the_exception():
    """Most Python of the pages is run, not only compiled."""
    python = [block for block in BLOCKS if block.language == "python" and block.page.name not in PARSED_PAGES]
    assert sum(map(runs, python)) > 0.7 * len(python)


# ---- pages


def links_of(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:", link)]


@pytest.mark.parametrize("page", [pytest.param(page, id=name_of(page)) for page in PAGES])
def test_links_to_files_lead_somewhere(page):
    """`make docs` also checks the anchors, of the pages in docs/."""
    files = [link.split("#")[0] for link in links_of(page)]
    assert [file for file in files if file and not (page.parent / file).exists()] == []


def test_the_readme_is_short_and_its_first_commands_are_demo_and_test():
    readme = ROOT / "README.md"
    assert len(readme.read_text(encoding="utf-8").splitlines()) <= 150
    first = next(block for block in blocks_of(readme) if block.language == "bash")
    assert commands_of(first.code) == [["make", "demo"], ["make", "test"]]


def test_the_site_shows_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES if (ROOT / "docs") in page.parents]
    assert len(pages) > 20
    assert [page for page in pages if not re.search(rf": {page}$", navigation, re.MULTILINE)] == []


# ---- commands


def check_dino_hf(words: list[str]) -> None:
    """The command exists and has these options. Options of `train` may also be fields of recipes and of TrainingArguments."""
    from dino_hf.run.settings import parse_settings

    if words[0].startswith("--"):
        assert CliRunner().invoke(app, ["--help"]).output.count(words[0].split("=")[0])
        return
    command = COMMANDS[words[0]]
    if words[1:] == ["--help"]:
        return
    context = command.make_context(words[0], list(words[1:]))
    if context.args:
        parse_settings(context.args)


def check_script(words: list[str], capsys) -> None:
    """The script of this repository exists and has these options."""
    script = ROOT / words[0]
    text = script.read_text(encoding="utf-8")
    if script.parent.name == "convert_scripts":
        main = {"convert_checkpoint": convert_checkpoint.main, "verify_conversion": verify_conversion.main}[script.stem]
        with pytest.raises(SystemExit):
            main(["--help"])
        text = capsys.readouterr().out
    else:
        text = "".join(file.read_text(encoding="utf-8") for file in script.parent.glob("*.py"))
    for option in (word for word in words if word.startswith("--")):
        assert re.search(rf"(?<!\w){option.lstrip('-')}(?![\w-])", text), f"{words[0]} has no option {option}"


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for word in words[1:]:
        if found := re.fullmatch(r"(?:\.|dino_hf)\[(.+)\]", word):
            assert set(found[1].split(",")) <= set(extras)
        else:
            assert word in (".", "bitsandbytes"), word


def check_make(words: list[str]) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {word for word in words if "=" not in word} <= targets


def check_command(words: list[str], capsys) -> None:
    program, rest = Path(words[0]).name, words[1:]
    if program == "dino-hf":
        check_dino_hf(rest)
    elif program == "make":
        check_make(rest)
    elif program == "pip":
        check_pip(rest)
    elif program == "python" and rest[0] != "-m":
        check_script(rest, capsys)
    elif program == "torchrun":
        place = rest.index("-m") if "-m" in rest else None
        if place is not None:
            importlib.import_module(rest[place + 1])
            check_dino_hf(rest[place + 2 :])
    else:
        assert program in ("curl", "git"), f"{words} is checked by nothing"


@pytest.mark.parametrize("block", of_language("bash"))
def test_commands_exist_with_their_options(block, capsys):
    subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
    for words in commands_of(block.code):
        check_command(words, capsys)


def test_a_wrong_command_is_found(capsys):
    for code in ("dino-hf trian x", "dino-hf eval a b --splt test", "make tset", "pip install '.[lorra]'", "train x"):
        (words,) = commands_of(code)
        with pytest.raises((Exception, SystemExit)):  # of click, argparse or an assertion
            check_command(words, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("bash", set()))
def test_the_commands_of_a_page_run(page, desk):
    """Commands of dino-hf, one after another, on the stand-ins."""
    if page.name == "quickstart.md":
        shutil.rmtree("scenes")  # it draws them
    write_video(desk / "clip.mp4")
    for block in blocks_of(page):
        for words in commands_of(block.code) if block.language == "bash" and runs(block) else ():
            if words[0] != "dino-hf" or words[1].startswith("--") or words[1] == "convert":
                continue
            if words[1] == "train" and "--output-dir" in words:  # a stand-in of what this command makes
                shutil.rmtree(words[words.index("--output-dir") + 1], ignore_errors=True)
            result = CliRunner().invoke(app, [*words[1:], *TOY_OPTIONS.get(words[1], [])])
            assert result.exit_code in (0, 2 if words[1] == "doctor" else 0), (
                f"{words}: {result.output}"
            )  # 2: wrong data


def write_video(path: Path) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 96, 64
        for index in range(3):
            frame = av.VideoFrame.from_ndarray(np.asarray(noise(96, 64, seed=index)), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
