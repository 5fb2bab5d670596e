"""The command `dino-hf`."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer

from ..attention_backends import ENVIRONMENT_VARIABLE, choose_backend, describe_backends
from .kernel_loading import cache_dir, load_kernel

app = typer.Typer(
    help="DINO object detection with Hugging Face Transformers.", no_args_is_help=True, add_completion=False
)

_PICTURES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")
_PACKAGES = ("dino_hf", "torch", "torchvision", "transformers", "accelerate", "datasets", "triton", "kernels", "timm")


@app.command()
def env() -> None:
    """Print versions, devices and the backends of deformable attention: which runs, and why the others do not."""
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


@app.command()
def augment(
    annotations: Annotated[Path, typer.Argument(help="COCO json.", show_default=False)],
    image_dir: Annotated[Path, typer.Argument(help="Folder of its images.", show_default=False)],
    recipe: Annotated[str, typer.Option(help="Training recipe whose augmentation is shown.")] = "paper-12ep",
    output: Annotated[Path, typer.Option(help="Picture to write.")] = Path("augmented.png"),
    num_images: Annotated[int, typer.Option(min=1, help="Rows: images of the data.")] = 4,
    num_samples: Annotated[int, typer.Option(min=1, help="Columns: epochs.")] = 4,
    seed: Annotated[int, typer.Option(help="Of the augmentation and of the choice of images.")] = 0,
) -> None:
    """Draw images as training gets them: each as annotated, and beside it as augmented in the first epochs."""
    # Imported here: they take seconds, which other commands need not wait for, and matplotlib may be missing.
    from ..training import load_coco
    from ..training.recipes import get_recipe

    try:
        from .augmentation_grid import save_augmentation_grid
    except ImportError as error:
        if error.name.partition(".")[0] != "matplotlib":
            raise
        _fail("matplotlib, which draws the picture, is not installed; pip install 'dino_hf[plots]'.")
    if output.is_dir() or not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        _fail(f"{output} cannot be written; choose a file in a folder that exists, such as --output augmented.png.")
    if output.suffix.lower() not in _PICTURES:
        _fail(
            f"{output} does not end in one of {', '.join(_PICTURES)}, the pictures that can be written; choose for example "
            f"--output {output.with_suffix('.png')}."
        )
    try:
        augmentation = get_recipe(recipe).augmentation
        data = load_coco(annotations, image_dir)
        save_augmentation_grid(output, data, augmentation, num_images, num_samples, seed)
    except (OSError, ValueError) as error:
        _fail(" ".join([str(error), *getattr(error, "__notes__", [])]))
    print(f"Look at {output}.")


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
