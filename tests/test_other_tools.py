"""What people do to a detector with tools that know nothing of it: their collators, tracers, exporters, adapters, quantizers."""

import importlib
import warnings

import pytest
import torch
from torch import nn

import dino_hf
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from helpers import SIZES, SWIN, randomize, tiny_config, tiny_images, tiny_labels


def make_model(**changes) -> DinoDetrForObjectDetection:
    return DinoDetrForObjectDetection(tiny_config(**changes))


def labels_with_sizes() -> list[dict]:
    return [{**labels, "size": torch.tensor(size)} for labels, size in zip(tiny_labels(3, 0), SIZES, strict=True)]


def with_sizes_padded(labels: list[dict]) -> dict:
    classes, boxes = torch.full((2, 3), -100), torch.zeros(2, 3, 4)
    classes[0], boxes[0] = labels[0]["class_labels"], labels[0]["boxes"]
    return {"class_labels": classes, "boxes": boxes, "size": torch.stack([one["size"] for one in labels])}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_without_a_mask_it_is_made_from_the_sizes_in_the_labels(padded, training):
    model, (pixel_values, pixel_mask) = randomize(make_model(), 0.1).train(training), tiny_images()
    labels = labels_with_sizes()
    given = with_sizes_padded(labels) if padded else labels
    results = []
    for mask in (pixel_mask, None):
        torch.manual_seed(0)  # the noise of denoising
        results.append(model(pixel_values, mask, given))
    assert torch.equal(results[0].loss, results[1].loss)
    assert torch.equal(results[0].pred_boxes, results[1].pred_boxes)
    torch.manual_seed(0)
    bare = [{name: one[name] for name in ("class_labels", "boxes")} for one in labels]
    assert not torch.equal(model(pixel_values, None, bare).loss, results[0].loss)


def test_the_base_model_makes_the_mask_too():
    model, (pixel_values, pixel_mask) = randomize(make_model(), 0.1).model.eval(), tiny_images()
    states = [model(pixel_values, mask, labels_with_sizes()).last_hidden_state for mask in (pixel_mask, None)]
    assert torch.equal(*states)


@pytest.mark.parametrize("size", [(65, 104), (64, 105), (0, 104), (-5, 20)])
def test_a_size_that_no_image_of_the_batch_has_is_refused(size):
    labels = labels_with_sizes()
    labels[1]["size"] = torch.tensor(size)
    with pytest.raises(ValueError, match=r"labels\[1\]: size is .* Pass pixel_mask"):
        make_model()(tiny_images()[0], labels=labels)


def test_the_image_processor_says_the_size_without_padding():
    processor = DinoDetrImageProcessor(
        size={"max_height": 96, "max_width": 96}, pad_size={"height": 96, "width": 96}, do_pad=True
    )
    image = torch.zeros(3, 48, 96, dtype=torch.uint8)
    annotation = {"image_id": 1, "annotations": [{"bbox": [0, 0, 10, 10], "category_id": 0}]}
    batch = processor(images=[image], annotations=[annotation], return_tensors="pt")
    assert batch["labels"][0]["size"].tolist() == [48, 96]
    assert tuple(batch["pixel_values"].shape[2:]) == (96, 96)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_images_of_other_than_three_channels_are_refused_in_words(channels):
    with pytest.raises(ValueError, match="takes 3 channels, RGB"):
        make_model()(torch.zeros(2, channels, 64, 104))


class Predictions(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, pixel_mask):
        outputs = self.model(pixel_values, pixel_mask)
        return outputs.logits, outputs.pred_boxes


@pytest.mark.filterwarnings("ignore")  # the tracer warns of each size that it asks for
def test_a_traced_model_holds_for_other_sizes_and_batches():
    def inputs(batch, height, width):
        mask = torch.ones(batch, height, width, dtype=torch.long)
        mask[0, height // 2 :] = 0
        return torch.randn(batch, 3, height, width), mask

    module = Predictions(randomize(make_model(), 0.1)).eval()
    with torch.no_grad():
        traced = torch.jit.trace(module, inputs(2, 128, 160), check_trace=False)
        for sizes in ((1, 192, 128), (3, 96, 256)):
            others = inputs(*sizes)
            # other operators for deformable attention, in float32
            torch.testing.assert_close(traced(*others), module(*others), rtol=1e-4, atol=1e-4)


def test_refined_boxes_are_clipped_once_each_in_a_graph():
    """An exporter's optimizer merges successive clips of one value wrongly, and ONNX Runtime refuses the file."""
    from dino_hf.model.box_ops import refine_boxes

    class Refine(nn.Module):
        def forward(self, boxes, delta):
            return refine_boxes(boxes.sigmoid(), delta)

    program = torch.export.export(Refine(), (torch.randn(2, 4), torch.randn(2, 4)))
    clips = [node for node in program.graph.nodes if "clamp" in str(node.target)]
    assert len(clips) == 2
    assert not any(parent in clips for node in clips for parent in node.all_input_nodes)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_behind_frozen_layers_every_checkpointed_layer_learns(part, reentrant):
    model, (pixel_values, pixel_mask) = make_model().train(), tiny_images()
    model._set_gradient_checkpointing(
        True, lambda f, *args, **kw: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=reentrant, **kw)
    )
    trained = [p for name, p in model.named_parameters() if name.startswith(f"model.{part}.layers.0.mlp")]
    model.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    model(pixel_values, pixel_mask, tiny_labels(2, 1)).loss.backward()
    assert all(parameter.grad is not None for parameter in trained)
    assert not pixel_values.requires_grad


def test_a_backbone_with_frozen_stages_learns_with_reentrant_checkpointing():
    model, (pixel_values, pixel_mask) = (
        make_model(backbone_config=dict(SWIN), num_frozen_backbone_stages=2),
        tiny_images(),
    )
    model.train()._set_gradient_checkpointing(
        True, lambda f, *args, **kw: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=True, **kw)
    )
    model(pixel_values, pixel_mask, tiny_labels(2, 1)).loss.backward()
    lost = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lost == []


def test_tools_find_where_gradients_enter():
    model = make_model()
    assert model.get_input_embeddings() is model.model.encoder.level_embed
    assert model.model.get_input_embeddings() is model.model.encoder.level_embed


@pytest.mark.parametrize("part", ["data", "evaluation", "export", "inference", "training"])
def test_parts_that_messages_name_are_found(part):
    assert getattr(dino_hf, part) is importlib.import_module(f"dino_hf.{part}")
    assert part in dir(dino_hf)


def test_linear_layers_and_convolutions_are_those_of_torch():
    model = make_model(backbone_config=dict(SWIN))
    kinds = {type(part) for part in model.modules() if isinstance(part, nn.Linear | nn.Conv2d)}
    assert kinds == {nn.Linear, nn.Conv2d}


def test_linear_layers_can_be_quantized():
    model = randomize(make_model(), 0.1).eval()
    linears = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch moves it to another package
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        outputs = quantized(*tiny_images())
    replaced = [name for name, part in quantized.named_modules() if "quantized" in type(part).__module__]
    assert len(linears) > 20
    assert set(linears) <= set(replaced)
    assert outputs.pred_boxes.isfinite().all()


VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "out_features": ["stage2", "stage3", "stage4"],
}


@pytest.mark.parametrize(
    ("backbone", "unused"),
    [
        ({"model_type": "dinov2", "image_size": 56, **VIT}, "mask_token"),
        ({"model_type": "dinov3_vit", "intermediate_size": 64, **VIT}, "mask_token"),
        (
            {
                "model_type": "maskformer-swin",
                "embed_dim": 8,
                "depths": [1] * 4,
                "num_heads": [1, 2, 2, 4],
                "window_size": 3,
            },
            None,
        ),
        pytest.param(
            {"model_type": "timm_backbone", "backbone": "hrnet_w18_small", "out_indices": [1, 2, 3]},
            "incre_modules",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_no_map_of_a_backbone_depends_on_is_not_trained(backbone, unused, tmp_path):
    if backbone["model_type"] == "timm_backbone":
        pytest.importorskip("timm")
    model = make_model(backbone_config=backbone)
    model.save_pretrained(tmp_path)
    for one in (model, DinoDetrForObjectDetection.from_pretrained(tmp_path)):
        one.train()(torch.randn(2, 3, 128, 160), labels=tiny_labels(2, 1)).loss.backward()
        parameters = dict(one.model.backbone.model.named_parameters())
        lost = [name for name, p in parameters.items() if p.requires_grad and p.grad is None]
        assert lost == []
        frozen = [name for name, p in parameters.items() if not p.requires_grad]
        assert unused is None or any(unused in name for name in frozen)
        assert len(frozen) < len(parameters) / 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 10**5, "width": 8}}, r"height=100000; a side must lie in \[1, 16384\]"),
        ({"size": {"height": 16_385, "width": 8}}, "height=16385"),
        ({"size": {"shortest_edge": -5, "longest_edge": 8}}, "shortest_edge=-5"),
        ({"do_pad": True, "pad_size": {"height": 8, "width": 10**12}}, "width=1000000000000"),
        ({"image_mean": [0.5] * 5}, "image_mean=.* has 5 numbers"),
    ],
)
def test_an_image_processor_refuses_absurd_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        DinoDetrImageProcessor(**settings)(images=[torch.zeros(3, 6, 8, dtype=torch.uint8)], return_tensors="pt")
