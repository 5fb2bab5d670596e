"""The average of weights follows its formula, lends them and takes them back bit by bit, and goes on where it was saved."""

import math

import pytest
import torch
from torch import nn
from transformers import AutoModelForObjectDetection

from dino_hf import DinoDetrForObjectDetection
from dino_hf.training.ema import ModelEma
from helpers import randomize, tiny_config, tiny_images


def make_model() -> nn.Module:
    """With a parameter that is frozen, and a buffer of whole numbers."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    return model


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_same(first: dict, second: dict) -> None:
    assert set(first) == set(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_the_average_follows_its_formula(warmup_steps):
    model = make_model()
    ema = ModelEma(model, decay=0.8, warmup_steps=warmup_steps)
    expected = None
    for n in range(6):
        randomize(model)
        model(torch.randn(5, 3))  # moves the statistics of batch norm
        ema.update()
        d = 0.8 * (1 - math.exp(-n / warmup_steps)) if warmup_steps else 0.8
        weights = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
        if n == 0:
            expected = weights
        else:
            expected = {name: d * expected[name] + (1 - d) * weights[name] for name in weights}
    assert ema.num_updates == 6
    for name, parameter in ema.module.named_parameters():
        # float32, and six updates
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-6, atol=1e-6, msg=name)
    assert not torch.equal(ema.module[0].weight, model[0].weight)
    for name, buffer in ema.module.named_buffers():
        assert torch.equal(buffer, model.get_buffer(name)), name


def test_a_frozen_parameter_stays_as_it_is_bit_by_bit():
    model = make_model()
    ema = ModelEma(model, decay=0.99)
    for _ in range(20):
        nn.init.normal_(model[0].weight)
        ema.update()
    assert torch.equal(ema.module[2].weight, model[2].weight)


def test_weights_are_lent_and_come_back_bit_by_bit():
    model = randomize(make_model())
    ema = ModelEma(model, decay=0.5)
    ema.update()
    randomize(model)
    model(torch.randn(5, 3))
    ema.update()
    own, averaged = state(model), state(ema.module)
    with ema.applied() as lent:
        assert lent is model
        assert_same(state(model), averaged)
        model(torch.randn(5, 3))  # in training mode: buffers move
    assert_same(state(model), own)
    assert_same(state(ema.module), averaged)

    def break_off():
        with ema.applied():
            randomize(model)
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    assert_same(state(model), own)
    assert_same(state(ema.module), averaged)
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, True, True, True, False, True]


def test_an_average_that_is_restarted_forgets():
    model = randomize(make_model())
    ema = ModelEma(model, decay=0.9)
    ema.update()
    ema.update()
    ema.restart()
    randomize(model)
    ema.update()
    assert ema.num_updates == 1
    assert_same(state(ema.module), state(model))


def test_an_average_that_was_saved_is_a_model_and_goes_on_bit_by_bit(tmp_path):
    def make():
        torch.manual_seed(0)
        model = randomize(DinoDetrForObjectDetection(tiny_config()), 0.1).eval()
        return model, ModelEma(model, decay=0.7, warmup_steps=3)

    def go_on(model, ema):
        torch.manual_seed(1)
        for _ in range(3):
            randomize(model, 0.1)
            ema.update()
        return state(ema.module)

    model, ema = make()
    for _ in range(2):
        randomize(model, 0.1)
        ema.update()
    ema.save(tmp_path / "ema")
    saved = state(ema.module)

    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path / "ema")
    assert_same(state(loaded), saved)
    images, mask = tiny_images()
    with ema.applied(), torch.no_grad():
        expected = model(images, mask)
    assert torch.equal(loaded(images, mask).logits, expected.logits)

    other_model, other = make()
    other.load(tmp_path / "ema")
    assert other.num_updates == 2
    assert_same(state(other.module), saved)
    assert_same(go_on(other_model, other), go_on(model, ema))


def test_the_weights_of_another_model_are_refused(tmp_path):
    ModelEma(DinoDetrForObjectDetection(tiny_config()), decay=0.9).save(tmp_path / "ema")
    other = ModelEma(DinoDetrForObjectDetection(tiny_config(encoder_layers=1)), decay=0.9)
    with pytest.raises(RuntimeError, match=r"encoder\.layers\.1"):
        other.load(tmp_path / "ema")
    with pytest.raises(FileNotFoundError):
        other.load(tmp_path / "elsewhere")


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match=rf"decay={decay} must be at least 0 and below 1"):
        ModelEma(make_model(), decay)


def test_weights_of_low_precision_are_refused():
    with pytest.raises(ValueError, match=r"weights in \['torch.bfloat16'\], too coarse .* dtype=torch.float32"):
        ModelEma(make_model().bfloat16(), 0.9)
