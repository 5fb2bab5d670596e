"""`dino-hf train` as people type it."""

import pytest
import typer
from typer.testing import CliRunner

from dino_hf.cli import train as cli_train
from dino_hf.common.scenes import make_scenes
from dino_hf.run import training_run as run
from helpers import tiny_config

app = typer.Typer()
app.command("train", context_settings=cli_train.CONTEXT)(cli_train.train)
app.callback()(lambda: None)  # or the only command would need no name


def invoke(*words):
    return CliRunner().invoke(app, ["train", *map(str, words)], terminal_width=100)


@pytest.fixture
def calls(monkeypatch):
    calls = []
    monkeypatch.setattr(run, "train", lambda data, **settings: calls.append((data, settings)))
    return calls


def test_options_and_fields_of_training_arguments_and_recipes_reach_training(calls):
    done = invoke(
        "my-data",
        *("--model", "dino", "--recipe", "paper-12ep", "--output_dir", "out", "--batch_size", 4, "--seed", 3),
        *("--report-to", "wandb", "--report-to", "tensorboard", "--resume", "--validation-fraction", 0.1),
        *("--on-bad-image", "raise", "--check-images", "--no-training-doctor"),
        *("--learning-rate=1e-3", "--bf16", "--max_steps", 7, "--lr-drop-epochs", 3, 4, "--ema-decay", "none"),
    )
    assert done.exit_code == 0, done.output
    ((data, settings),) = calls
    assert data == "my-data"
    expected = {
        "model": "dino",
        "backbone": None,
        "num_queries": None,
        "freeze": None,
        "lora": None,
        "keep_classes": None,
        "old_data": None,
        "tiles": None,
        "tile_overlap": None,
        "empty_tiles": None,
        "augmentation": None,
        "recipe": "paper-12ep",
        "batch_size": 4,
        "seed": 3,
        "report_to": ["wandb", "tensorboard"],
        "resume": True,
        "dry_run": False,
        "validation_fraction": 0.1,
        "box_format": None,
        "allow_outside": None,
        "trust_boxes": None,
        "on_bad_image": "raise",
        "check_images": True,
        "training_doctor": False,
        "learning_rate": 1e-3,
        "bf16": True,
        "max_steps": 7,
        "lr_drop_epochs": [3, 4],
        "ema_decay": None,
    }
    assert str(settings.pop("output_dir")) == "out"
    assert settings == expected


def test_what_is_not_said_is_left_to_training(calls):
    assert invoke("my-data").exit_code == 0
    settings = calls[0][1]
    assert settings.pop("batch_size") == "auto"
    assert str(settings.pop("output_dir")) == "outputs/train"
    assert {name for name, value in settings.items() if value not in (None, False)} == set()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--bf16", "my-data"), "error: The data set must come before --bf16"),
        (("my-data", "--batch-size", "all"), "error: --batch-size all must be a number of images, or auto."),
        (("my-data", "--learning-rte", "1"), "error: There is no option --learning-rte; did you mean --learning-rate"),
        (("my-data", "other-data"), "error: 'other-data' does not belong to an option"),
    ],
)
def test_mistakes_are_one_sentence(calls, words, message):
    done = invoke(*words)
    assert done.exit_code == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert calls == []


def test_errors_of_training_are_one_sentence_and_debug_shows_where(monkeypatch, tmp_path):
    missing = tmp_path / "nothing"
    done = invoke(missing, "--output-dir", tmp_path / "out")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert "nothing" in done.stderr
    assert invoke(missing, "--output-dir", tmp_path / "out", "--debug").exception.__traceback__ is not None


def test_a_run_that_is_stopped_says_how_to_go_on_in_one_line(monkeypatch):
    def stop(data, **settings):
        error = KeyboardInterrupt()
        error.add_note("3 steps are done; --resume continues from the newest checkpoint.")
        raise error

    monkeypatch.setattr(run, "train", stop)
    done = invoke("my-data")
    assert done.exit_code == 130
    assert done.stderr == "error: stopped. 3 steps are done; --resume continues from the newest checkpoint.\n"


def test_a_dry_run_from_the_command_line(tmp_path):
    make_scenes(tmp_path / "data/train", 5, seed=0)
    tiny_config(num_denoising=5).save_pretrained(tmp_path / "untrained")
    words = ("--output-dir", tmp_path / "out", "--dry-run", "--use-cpu", "--num-denoising", "5", "--report-to", "none")
    done = invoke(tmp_path / "data", "--model", tmp_path / "untrained", "--short-sides", 40, 48, *words)
    assert done.exit_code == 0, done.output
    words = " ".join(done.output.split())
    assert "images 4 to train on, 1 held out" in words
    assert "augmentation.short_sides 40, 48, the recipe has" in words
    assert not (tmp_path / "out").exists()


def test_help_is_short_and_ends_with_an_example():
    done = invoke("--help")
    assert done.exit_code == 0
    assert "Example: dino-hf train my-data --model detrex/dino_r50_4scale_12ep" in " ".join(done.output.split())
    assert len(done.output.splitlines()) < 96
