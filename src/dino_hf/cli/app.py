"""The command `dino-hf`. Commands import torch and transformers only when they run, so `--help` is fast."""

from importlib.metadata import version
from typing import Annotated

import typer
from typer.core import TyperGroup

from .augment import augment
from .command_errors import FAILED
from .convert import convert
from .doctor import doctor
from .env import env
from .eval import evaluate
from .export import export
from .models import models
from .predict import predict
from .push import push
from .scenes import scenes
from .train import CONTEXT as ANY_FIELD
from .train import train

_UsageError = typer.BadParameter.__base__  # click's UsageError; newer versions of typer contain click


class _Commands(TyperGroup):
    """A group of commands. A wrong command line exits with 1, not with click's 2: here 2 means that the data have errors."""

    def make_context(self, *arguments, **settings):
        try:
            return super().make_context(*arguments, **settings)
        except _UsageError as error:
            error.exit_code = FAILED
            raise

    def invoke(self, context):
        try:
            return super().invoke(context)
        except _UsageError as error:
            error.exit_code = FAILED
            raise


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
)

_DATA, _MODELS, _OTHER = "Data", "Models", "Other"


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print(f"dino-hf {version('dino_hf')}")
        raise typer.Exit


def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """DINO object detection with Hugging Face Transformers: train, evaluate and predict on your own data."""


app.callback()(_options)
app.command("doctor", rich_help_panel=_DATA)(doctor)
app.command("augment", rich_help_panel=_DATA, context_settings=ANY_FIELD)(augment)
app.command("scenes", rich_help_panel=_DATA)(scenes)
app.command("train", rich_help_panel=_MODELS, context_settings=ANY_FIELD)(train)
app.command("eval", rich_help_panel=_MODELS)(evaluate)
app.command("predict", rich_help_panel=_MODELS)(predict)
app.command("export", rich_help_panel=_MODELS)(export)
app.command("convert", rich_help_panel=_MODELS)(convert)
app.command("models", rich_help_panel=_MODELS)(models)
app.command("push", rich_help_panel=_MODELS)(push)
app.command("env", rich_help_panel=_OTHER)(env)


if __name__ == "__main__":
    app()
