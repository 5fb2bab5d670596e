"""The operator of exported graphs. tests/test_ms_deform_attn.py compares its results with those of the other backends."""

import torch

from dino_hf.model.attention_backends import choose_backend
from dino_hf.model.attention_operators import ms_deform_attn_gather, ms_deform_attn_reference


def random_inputs(shapes, dtype=torch.float64):
    value = torch.randn(2, sum(height * width for height, width in shapes), 3, 4, dtype=dtype)
    locations = torch.rand(2, 7, 3, len(shapes), 2, 2, dtype=dtype) * 1.4 - 0.2  # some outside
    return value, locations, torch.rand(2, 7, 3, len(shapes), 2, dtype=dtype)


def test_gradients_are_those_of_the_reference():
    shapes = ((6, 9), (3, 5), (1, 2))
    inputs = [x.requires_grad_() for x in random_inputs(shapes)]
    grads = []
    for function in (ms_deform_attn_gather, ms_deform_attn_reference):
        function(inputs[0], shapes, *inputs[1:]).square().sum().backward()
        grads.append([x.grad for x in inputs])
        for x in inputs:
            x.grad = None
    # the same sums in another order, in float64
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)


class Attention(torch.nn.Module):
    """Levels of half and a quarter of a map, as a traced model has them."""

    def forward(self, maps, locations, weights):
        height, width = maps.shape[1:3]
        shapes = ((height, width), (height // 2, width // 2))
        half = maps[:, : height // 2, : width // 2]
        return ms_deform_attn_gather(torch.cat([maps.flatten(1, 2), half.flatten(1, 2)], 1), shapes, locations, weights)


def test_one_graph_serves_levels_of_any_shape():
    def inputs(batch, height, width):
        _, locations, weights = random_inputs(((1, 1), (1, 1)))
        return torch.randn(2, height, width, 3, 4, dtype=torch.float64)[:batch], locations[:batch], weights[:batch]

    dynamic = torch.export.Dim.DYNAMIC
    axes = ({0: dynamic, 1: dynamic, 2: dynamic}, {0: dynamic}, {0: dynamic})
    program = torch.export.export(Attention(), inputs(2, 6, 9), dynamic_shapes=axes)
    assert not [node for node in program.graph.nodes if "grid_sample" in str(node.target)]
    for sizes in ((2, 4, 13), (1, 7, 5)):
        others = inputs(*sizes)
        torch.testing.assert_close(program.module()(*others), Attention()(*others), rtol=0, atol=1e-12)


def test_gather_is_only_used_by_name_or_in_an_export():
    assert choose_backend(None, "cpu", torch.float64) == "torch"
    assert choose_backend("gather", "cpu", torch.float32) == "gather"
