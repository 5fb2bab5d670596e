"""Random numbers that do not change the generators of the caller."""

from contextlib import AbstractContextManager

import torch


def forked_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Within the block, draws and seeds do not change the generators of CPU and device, which continue afterwards as before it.

    Args:
        device: of any type. `torch.random.fork_rng` alone takes the device for one of CUDA in older versions, and
            `torch.manual_seed` seeds all accelerators.
    """
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
