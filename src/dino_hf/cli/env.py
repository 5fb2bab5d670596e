"""`dino-hf env`: print versions, devices and backends of this machine."""

import platform
from importlib.metadata import PackageNotFoundError, version

from .command_errors import Debug, one_sentence_errors

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


def env(debug: Debug = False) -> None:
    """Print versions, devices and the backends of deformable attention, with reasons for those that are not available."""
    with one_sentence_errors(debug):
        _print_environment()


def _print_environment() -> None:
    # Imported here, because `--help` does not need them and they take seconds.
    import torch

    from ..common.paths import NoCacheFolder, cache_dir
    from ..model.attention_backends import ENVIRONMENT_VARIABLE, choose_backend, describe_backends

    print(f"Python        {platform.python_version()} on {platform.platform()}")
    for package in _PACKAGES:
        try:
            # only `torch.__version__` includes the CUDA version
            print(f"{package:<13} {torch.__version__ if package == 'torch' else version(package)}")
        except PackageNotFoundError:
            print(f"{package:<13} not installed")
    print(f"CPU           {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        print(f"CUDA          {torch.cuda.get_device_name(index)}, compute {torch.cuda.get_device_capability(index)}")
    if not torch.cuda.is_available():
        print("CUDA          no device")
    try:
        print(f"cache         {cache_dir()}")
    except NoCacheFolder as error:
        print(f"cache         none: {error}")

    print("\nBackends of deformable attention")
    for name, reason in sorted(describe_backends().items()):
        print(f"  {name:<11} {'available' + _vectors(name) if reason is None else 'not available: ' + reason}")
    print(f"\nChosen automatically, unless the configuration, {ENVIRONMENT_VARIABLE} or use_backend names one")
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            print(f"  {device:<4} {str(dtype).removeprefix('torch.'):<9} {choose_backend(None, device, dtype)}")


def _vectors(name: str) -> str:
    if name != "cpu":
        return ""
    from ..runtime.kernel_loading import load_kernel

    return {16: ", AVX-512", 8: ", AVX2", 4: ", vectors of 4 floats"}[load_kernel(native=True).vector_lanes()]
