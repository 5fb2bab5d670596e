import math

import pytest
import torch

from dino_hf.model.position_embedding import embed_boxes, embed_map, embed_whole_map, sine_embedding
from helpers import tiny_levels


def slow_sine(position: float, dim: int, temperature: float) -> list[float]:
    return [
        (math.sin if index % 2 == 0 else math.cos)(position / temperature ** (2 * (index // 2) / dim))
        for index in range(dim)
    ]


@pytest.mark.parametrize("temperature", [20.0, 10_000.0])
def test_sine_embedding_agrees_with_its_formula(temperature):
    positions = torch.rand(2, 3) * 6
    expected = torch.tensor([[slow_sine(x, 8, temperature) for x in row] for row in positions.tolist()])
    # float32 against Python's doubles
    torch.testing.assert_close(sine_embedding(positions, 8, temperature), expected, rtol=0, atol=1e-5)


def test_boxes_are_embedded_in_the_order_y_x_w_h():
    boxes = torch.rand(2, 3, 4)
    x, y, w, h = boxes.double().mul(2 * math.pi).unbind(-1)
    expected = [
        [[value for part in (y, x, w, h) for value in slow_sine(part[i, j].item(), 6, 10_000.0)] for j in range(3)]
        for i in range(2)
    ]
    embedded = embed_boxes(boxes, 6)
    assert embedded.shape == (2, 3, 24)
    # float32 against Python's doubles
    torch.testing.assert_close(embedded, torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("temperature", "offset"), [(20.0, 0.0), (10_000.0, -0.5)])
def test_map_positions_agree_with_a_loop_over_cells(temperature, offset):
    levels = tiny_levels()
    height, width = levels.shapes[0]
    mask = levels.split(levels.padding_mask)[0].unflatten(1, (height, width))
    embedded = embed_map(mask, 8, temperature, offset)
    assert embedded.shape == (2, 8, height, width)
    for image, (valid_height, valid_width) in enumerate([(6, 9), (4, 5)]):
        for row in range(valid_height):
            for column in range(valid_width):
                y = (row + 1 + offset) / (valid_height + 1e-6) * 2 * math.pi
                x = (column + 1 + offset) / (valid_width + 1e-6) * 2 * math.pi
                expected = torch.tensor(slow_sine(y, 4, temperature) + slow_sine(x, 4, temperature))
                # float32 against Python's doubles
                torch.testing.assert_close(embedded[image, :, row, column], expected, rtol=0, atol=1e-5)


def test_map_positions_are_float32_in_a_model_of_half_precision():
    mask = torch.zeros(2, 1, 300, dtype=torch.bool)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        embedded = embed_map(mask, 4, 20.0, 0.0)
    finally:
        torch.set_default_dtype(before)
    assert embedded.dtype == torch.float32
    assert len(embedded[0, 2:, 0].T.unique(dim=0)) == 300  # bfloat16 would put several columns on one place


def test_map_positions_of_an_image_do_not_depend_on_its_padding():
    alone = embed_map(torch.zeros(2, 4, 5, dtype=torch.bool), 8, 20.0, 0.0)
    padded = torch.ones(2, 6, 9, dtype=torch.bool)
    padded[:, :4, :5] = False
    torch.testing.assert_close(embed_map(padded, 8, 20.0, 0.0)[:, :, :4, :5], alone)


@pytest.mark.parametrize(("temperature", "offset"), [(20, 0), (10_000, -0.5)])
def test_a_map_without_padding_is_embedded_by_rows_and_columns_alike(temperature, offset):
    empty = torch.zeros(1, 5, 9, dtype=torch.bool)
    whole = embed_whole_map(5, 9, 16, temperature, offset, "cpu")
    assert torch.equal(whole, embed_map(empty, 16, temperature, offset))
