"""Blocks with random numbers of their own, on devices that are simulated too."""

import pytest
import torch

from dino_hf.common.random_numbers import forked_random_numbers


def test_the_generator_of_the_cpu_continues_as_if_there_had_been_no_block():
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    with forked_random_numbers(torch.device("cpu")):
        torch.manual_seed(4)
        assert not torch.equal(torch.rand(5), expected)
    assert torch.equal(torch.rand(5), expected)


@pytest.mark.parametrize("kind", ["mps", "xpu", "cuda"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_generator_of_an_accelerator_is_saved_and_restored(kind, fails, monkeypatch):
    state, module = [torch.tensor([1], dtype=torch.uint8)], getattr(torch, kind)
    monkeypatch.setattr(module, "get_rng_state", lambda device=kind: state[0].clone())
    monkeypatch.setattr(module, "set_rng_state", lambda new, device=kind: state.__setitem__(0, new))
    try:
        with forked_random_numbers(torch.device(kind, 0)):
            state[0] = torch.tensor([9], dtype=torch.uint8)  # what torch.manual_seed and draws do
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert state[0].tolist() == [1]
