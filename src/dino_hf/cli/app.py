"""The command `dino-hf`."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import torch
import typer
from typer.core import TyperGroup

from ..common.command_errors import FAILED, Debug, one_sentence_errors
from ..model.attention_backends import ENVIRONMENT_VARIABLE, choose_backend, describe_backends
from ..runtime.kernel_loading import cache_dir, load_kernel
from .augment import augment
from .doctor import doctor
from .eval import evaluate
from .export import export
from .predict import predict
from .scenes import scenes
from .train import CONTEXT as ANY_FIELD
from .train import train

_UsageError = typer.BadParameter.__base__  # of click, which newer versions of typer bring along


class _Commands(TyperGroup):
    """Commands that end with our exit code when the command line is wrong: click's own, 2, means something else here."""

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

_PACKAGES = (
    "dino_hf",
    "torch",
    "torchvision",
    "transformers",
    "accelerate",
    "datasets",
    "triton",
    "kernels",
    "timm",
    "onnx",
    "onnxruntime",
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
    """DINO object detection with Hugging Face Transformers: train, evaluate and predict on anyone's data."""


def env(debug: Debug = False) -> None:
    """Print versions, devices and the backends of deformable attention: which runs, and why the others do not."""
    with one_sentence_errors(debug):
        _print_environment()


def _print_environment() -> None:
    print(f"Python        {platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            print(
                f"{package:<13} {torch.__version__ if package == 'torch' else version(package)}"
            )  # torch's tells its CUDA
        except PackageNotFoundError:
            print(f"{package:<13} not installed")
    print(f"CPU           {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        print(f"CUDA          {torch.cuda.get_device_name(index)}, compute {torch.cuda.get_device_capability(index)}")
    if not torch.cuda.is_available():
        print("CUDA          no device")
    print(f"kernels in    {cache_dir() / 'kernels'}")

    print("\nBackends of deformable attention")
    for name, reason in sorted(describe_backends().items()):
        print(f"  {name:<11} {'available' + _vectors(name) if reason is None else 'out: ' + reason}")
    print(f"\nChosen without a name in configuration, {ENVIRONMENT_VARIABLE} or use_backend")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            print(f"  {device:<4} {str(dtype).removeprefix('torch.'):<9} {choose_backend(None, device, dtype)}")


def _vectors(name: str) -> str:
    if name != "cpu":
        return ""
    return {16: ", AVX-512", 8: ", AVX2", 4: ", vectors of 4 floats"}[load_kernel(native=True).vector_lanes()]


app.callback()(_options)
app.command("doctor", rich_help_panel=_DATA)(doctor)
app.command("augment", rich_help_panel=_DATA, context_settings=ANY_FIELD)(augment)
app.command("scenes", rich_help_panel=_DATA)(scenes)
app.command("train", rich_help_panel=_MODELS, context_settings=ANY_FIELD)(train)
app.command("eval", rich_help_panel=_MODELS)(evaluate)
app.command("predict", rich_help_panel=_MODELS)(predict)
app.command("export", rich_help_panel=_MODELS)(export)
app.command("env", rich_help_panel=_OTHER)(env)


if __name__ == "__main__":
    app()
