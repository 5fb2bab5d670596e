"""Options of the commands: those that errors name exist and take effect, and the documentation lists all of them."""

import re
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import dino_hf
from dino_hf.cli.app import app
from dino_hf.conversion import convert_checkpoint, verify_conversion
from dino_hf.evaluation import seen_images
from dino_hf.run import training_view

COMMANDS = typer.main.get_command(app).commands
DOCS = Path(__file__).parents[1] / "docs"
OF_REFUSALS = ("--box-format", "--allow-outside", "--trust-boxes")  # of data that cannot be read

GIVEN = {"box_format": "coco", "allow_outside": True, "trust_boxes": True}


def options_of(command: str) -> set[str]:
    return {name for one in COMMANDS[command].params for name in one.opts if name.startswith("--")}


class Stop(ValueError):
    pass


class NoModel:
    def __init__(self, model, device=None):
        pass


@pytest.fixture
def readings(monkeypatch):
    """With which settings data are read."""
    seen = []

    def load_data(source, **settings):
        seen.append(settings)
        raise Stop("as far as needed")

    for module in (seen_images, training_view):
        monkeypatch.setattr(module, "load_data", load_data)
    return seen


@pytest.mark.parametrize("command", ["train", "eval", "export", "augment"])
def test_a_command_that_reads_data_has_the_options_that_refusals_name(command):
    assert set(OF_REFUSALS) <= options_of(command)


def test_the_options_of_refusals_reach_the_reader_of_augment(readings, tmp_path):
    arguments = ["augment", "data", "--output", str(tmp_path / "a.png"), "--box-format", "coco"]
    result = CliRunner().invoke(app, [*arguments, "--allow-outside", "--trust-boxes"])
    assert result.stderr == "error: as far as needed\n"
    assert [one | GIVEN for one in readings] == readings != []


def test_the_options_of_refusals_reach_the_reader_of_evaluate(readings, monkeypatch):
    monkeypatch.setattr(sys.modules["dino_hf.evaluation.evaluate"], "Predictor", NoModel)
    with pytest.raises(Stop):
        dino_hf.evaluate("model", "data", box_format="coco", allow_outside=True, trust_boxes=True)
    assert [one | GIVEN for one in readings] == readings != []


def sections(page: str) -> dict[str, str]:
    """Heading of the second level -> what stands below it."""
    parts = re.split(r"^## (.+)$", (DOCS / page).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_of_a_command_is_in_its_table_with_the_text_of_its_help(command):
    found = [
        text for title, text in sections("commands_options.md").items() if title.split()[:2] == ["dino-hf", command]
    ]
    assert len(found) == 1, f"docs/commands_options.md has {len(found)} sections on {command}"
    rows = re.findall(r"^\| `(--[\w-]+)` \| .*?\| (.*) \|$", found[0], re.MULTILINE)
    options = [one for one in COMMANDS[command].params if one.param_type_name == "option" and one.name != "debug"]
    assert dict(rows) == {one.opts[0]: one.help for one in options}
    assert len(rows) == len(options)


def test_tables_have_no_section_on_a_command_that_is_gone():
    assert {title.split()[1] for title in sections("commands_options.md")} == set(COMMANDS)


@pytest.mark.parametrize("main", [convert_checkpoint.main, verify_conversion.main], ids=lambda main: main.__module__)
def test_each_option_of_the_converter_is_in_its_page(main, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out)) - {"--help"}
    page = (DOCS / "checkpoints.md").read_text(encoding="utf-8")
    assert [name for name in sorted(options) if not re.search(rf"{name}(?![\w-])", page)] == []
