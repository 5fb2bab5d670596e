"""Draw random numbers without changing the generators of the caller."""

from contextlib import AbstractContextManager

import torch


def forked_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """After the context, the random generators of CPU and device continue as if nothing was drawn or seeded inside.

    Args:
        device: device of any type. In older versions of torch, `fork_rng` needs the type, or it assumes CUDA.
    """
    return torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type)
