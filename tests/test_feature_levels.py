import pytest
import torch
import torch.nn.functional as F

from dino_hf.model.feature_levels import cell_centers, describe_levels, describe_whole_levels, flatten_maps, resize_mask
from helpers import tiny_levels

SHAPES = ((6, 9), (3, 5), (1, 2))


def test_tokens_run_level_after_level_and_row_after_row():
    maps = [torch.randn(2, 4, *shape) for shape in SHAPES]
    tokens = flatten_maps(maps)
    expected = [
        level[:, :, row, column] for level in maps for row in range(level.shape[2]) for column in range(level.shape[3])
    ]
    assert torch.equal(tokens, torch.stack(expected, dim=1))


def test_split_gives_back_the_tokens_of_each_level():
    maps = [torch.randn(2, 4, *shape) for shape in SHAPES]
    parts = tiny_levels().split(flatten_maps(maps))
    assert len(parts) == len(maps)
    for part, level in zip(parts, maps, strict=True):
        assert torch.equal(part, level.flatten(2).transpose(1, 2))


def test_padding_mask_and_shapes_follow_the_tokens():
    masks = [torch.rand(2, *shape) > 0.5 for shape in SHAPES]
    levels = describe_levels(masks)
    assert levels.shapes == SHAPES
    assert torch.equal(levels.padding_mask, flatten_maps([mask[:, None] for mask in masks])[..., 0])


def test_valid_ratios_are_shares_of_width_and_height():
    levels = tiny_levels(valid=((6, 9), (4, 5)))
    expected = torch.tensor([[[1, 1], [1, 1], [1, 1]], [[5 / 9, 4 / 6], [3 / 5, 2 / 3], [1 / 1, 1]]])
    expected[1, 2, 0] = 1.0  # the second of two columns begins at 1/2 of the map, before the image ends at 5/9
    torch.testing.assert_close(levels.valid_ratios, expected)


@pytest.mark.parametrize("valid", [((6, 9), (4, 5)), ((2, 3), (6, 1))])
def test_cell_centers_agree_with_a_loop_over_cells(valid):
    levels = tiny_levels(SHAPES, valid)
    centers = cell_centers(levels)
    for image in range(2):
        expected = []
        for (height, width), mask in zip(SHAPES, levels.split(levels.padding_mask), strict=True):
            inside = ~mask[image].view(height, width)
            valid_height, valid_width = int(inside[:, 0].sum()), int(inside[0].sum())
            expected += [
                ((column + 0.5) / valid_width, (row + 0.5) / valid_height)
                for row in range(height)
                for column in range(width)
            ]
        torch.testing.assert_close(centers[image], torch.tensor(expected))


def test_cell_centers_lie_inside_the_image_exactly_where_there_is_no_padding():
    levels = tiny_levels()
    inside = (cell_centers(levels) < 1).all(-1)
    assert torch.equal(inside, ~levels.padding_mask)
    assert levels.padding_mask.any()


def test_no_rounding_moves_a_center():
    # 13 columns of which 7 are valid: 7 / 13 * 13 is not 7 in float32
    masks = [torch.zeros(2, 3, 13, dtype=torch.bool)]
    masks[0][1, :, 7:] = True
    levels = describe_levels(masks)
    assert levels.valid_ratios[1, 0, 0] * 13 != 7
    centers = cell_centers(levels).unflatten(1, (3, 13))
    assert torch.equal(centers[1, 0, :, 0], (torch.arange(13) + 0.5) / 7)


def test_levels_without_padding_are_levels_whose_mask_is_empty():
    maps = [torch.randn(2, 4, *shape) for shape in SHAPES]
    whole, masked = describe_whole_levels(maps), describe_levels([torch.zeros(2, *shape).bool() for shape in SHAPES])
    assert whole.padding_mask is None
    assert whole.shapes == masked.shapes
    assert torch.equal(whole.valid_ratios, masked.valid_ratios)
    assert torch.equal(cell_centers(whole), cell_centers(masked))


def test_masks_of_maps_are_those_of_interpolate_to_the_last_pixel():
    for size in range(33, 900, 4):
        for cells in (-(-size // 4), size // 8, -(-size // 16), size // 32):
            pixels = torch.arange(size)[None, None].expand(2, 3, -1)
            expected = F.interpolate(pixels[:, None].float(), size=(2, cells))[:, 0].long()
            assert torch.equal(resize_mask(pixels, 2, cells), expected)
            assert torch.equal(resize_mask(pixels.mT, cells, 2), expected.mT)
