"""`torch.compile`: one graph at inference, two in training, none anew for another image size or number of boxes."""

import logging

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from dino_hf import DinoDetrForObjectDetection
from dino_hf.model.targets import PADDING_LABEL
from helpers import SIZES, needs_compiler, randomize, tiny_config, tiny_images, tiny_labels

# What torch compiles apart is left out: batches of 1, and of as many images as the decoder has layers; maps of one row or column;
# and, in torch 2.11, heights and widths by whether their half, rounded up, is even.
IMAGE_SIZES = ((109, 200), (133, 80), (161, 267), (97, 131), (266, 160))
ROUNDING = 1e-5  # float32: the compiler adds in another order


class Graphs:
    """A backend that runs what it gets, and keeps it."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


# torch looks at the gradient of a tensor that has none, while it compiles
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")


@pytest.fixture(autouse=True)
def nothing_compiled_before(monkeypatch):
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "handlers", [])  # pytest would keep all of it
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return randomize(
        DinoDetrForObjectDetection(tiny_config(encoder_layers=1, decoder_layers=2, num_feature_levels=3)), scale=0.1
    )


def batch(batch_size: int, size: tuple[int, int], is_padded: bool) -> dict:
    """Images; the last is smaller if they are padded."""
    inputs = {"pixel_values": torch.randn(batch_size, 3, *size)}
    if is_padded:
        inputs["pixel_mask"] = torch.ones(batch_size, *size, dtype=torch.long)
        inputs["pixel_mask"][-1, 2 * size[0] // 3 :] = inputs["pixel_mask"][-1, :, size[1] // 2 :] = 0
    return inputs


def padded(labels: list[dict]) -> dict:
    """As `DetectionCollator` gives them."""
    return {
        name: pad_sequence([entry[name] for entry in labels], batch_first=True, padding_value=value)
        for name, value in (("class_labels", PADDING_LABEL), ("boxes", 0.0))
    }


def assert_same_detections(compiled, model, inputs) -> None:
    with torch.no_grad():
        found, expected = compiled(**inputs), model(**inputs)
    for name in ("logits", "pred_boxes", "enc_topk_bboxes", "intermediate_logits"):
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=ROUNDING)


def loss_and_gradients(function, model, labels, seed: int) -> tuple[torch.Tensor, dict]:
    torch.manual_seed(seed)  # of the denoising queries
    inputs = tiny_images()
    model.zero_grad()
    loss = function(*inputs, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training(compiled, model, labels, seed: int) -> None:
    (loss, gradients), (expected_loss, expected) = (
        loss_and_gradients(function, model, labels, seed) for function in (compiled, model)
    )
    torch.testing.assert_close(loss, expected_loss, rtol=ROUNDING, atol=0)
    assert gradients.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in gradients.items():
        # The rounding of a large sum is what is left where gradients cancel each other.
        torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-5 * largest.item(), msg=name)


@needs_compiler
@pytest.mark.parametrize("is_padded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_inference_is_one_graph_with_the_kernel_in_it_for_all_image_sizes(model, is_padded):
    backend = Graphs()
    compiled = torch.compile(model.eval(), fullgraph=True, backend=backend)
    first, second, *others = (batch(3 + index % 3, size, is_padded) for index, size in enumerate(IMAGE_SIZES))
    assert_same_detections(compiled, model, first)
    assert_same_detections(compiled, model, second)  # torch learns that sizes vary
    with torch.compiler.set_stance("fail_on_recompile"):
        for inputs in others:
            assert_same_detections(compiled, model, inputs)
    for graph in backend.graphs:
        calls = [
            node for node in graph.graph.nodes if "ms_deform_attn" in str(node.target) and node.op == "call_function"
        ]
        assert len(calls) == model.config.encoder_layers + model.config.decoder_layers
    assert len(backend.graphs) == 2


def test_training_is_two_graphs_whatever_the_number_of_boxes(model):
    backend = Graphs()
    compiled = torch.compile(model.train(), backend=backend)
    assert_same_training(compiled, model, padded(tiny_labels(3, 0)), seed=0)
    assert len(backend.graphs) == 2  # up to the denoising queries, and the decoder
    assert_same_training(compiled, model, padded(tiny_labels(2, 7)), seed=1)
    assert len(backend.graphs) == 3  # torch learns that the number of denoising queries varies
    for seed, counts in enumerate([(1, 4), (0, 12), (1, 1)]):
        assert_same_training(compiled, model, padded(tiny_labels(*counts)), seed)
    assert len(backend.graphs) == 3


@pytest.mark.slow
# torch 2.11's inductor calls what it deprecates
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_inductor_finds_the_same(model):
    compiled = torch.compile(model.eval(), fullgraph=True)
    for is_padded in (False, True):
        assert_same_detections(compiled, model, batch(2, SIZES[0], is_padded))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_inductor_trains_the_same(model):
    compiled = torch.compile(model.train())
    for seed, counts in enumerate([(3, 0), (2, 7), (5, 1)]):
        assert_same_training(compiled, model, padded(tiny_labels(*counts)), seed)


@pytest.mark.slow
def test_another_image_size_is_not_compiled_anew_by_what_follows_dynamo(model):
    compiled = torch.compile(model.eval(), fullgraph=True, backend="aot_eager")
    inputs = [batch(3 + index % 3, size, is_padded=True) for index, size in enumerate(IMAGE_SIZES)]
    for first in inputs[:2]:
        assert_same_detections(compiled, model, first)
    with torch.compiler.set_stance("fail_on_recompile"):
        for other in inputs[2:]:
            assert_same_detections(compiled, model, other)
