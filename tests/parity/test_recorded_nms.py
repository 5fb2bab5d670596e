"""Detections of Co-DINO (soft NMS) and Stable-DINO (hard NMS), from the recorded logits and boxes of the last decoder layer.

Detections are compared as pairs of a label and a box. Co-DINO moves the boxes of class k by k times their largest coordinate, so
that classes do not overlap. This costs digits in float32: a recorded score that NMS lowered is off by up to 1e-4.
"""

from types import SimpleNamespace

import pytest
import torch
from recipe import DATA, load_manifest
from safetensors.torch import load_file

from dino_hf import DinoDetrImageProcessor, DinoDetrImageProcessorPil

SOFT = {"method": "soft", "iou_threshold": 0.8, "min_score": 1e-3}
# variant, file, name of the detections in it, setting. Sense-X has as many candidates as queries, mmdetection has 300.
CASES = [
    *(
        (variant, file, name, SOFT | {"candidates": candidates})
        for variant, file in (
            ("codetr/r50_5scale", "eval_outputs"),
            ("codetr/swin_t_5scale", "eval_outputs"),
            ("codetr/swin_t_5scale", "eval_outputs_nomask"),  # padding is image, as in the models with a canvas
        )
        for name, candidates in (("post", None), ("post300", 300))
    ),
    ("stabledino/r50_4scale", "eval_outputs", "post_nms", {"method": "hard", "iou_threshold": 0.8, "candidates": 300}),
    ("stabledino/r50_4scale", "eval_outputs_masked", "post_nms", {"method": "hard", "candidates": 300}),
]


def load(variant, file):
    recorded = load_file(DATA / variant / f"{file}.safetensors")
    sizes = load_manifest(variant)["images"]
    if file == "eval_outputs_nomask":
        sizes = [[max(size[axis] for size in sizes) for axis in (0, 1)]] * len(sizes)
    outputs = SimpleNamespace(logits=recorded["logits"][-1], pred_boxes=recorded["pred_boxes"][-1])
    return recorded, outputs, sizes


def assert_same_detections(found, recorded, name, pixels=2e-3):
    """Each recorded pair of label and box has its own detection, with the score of the recording.

    Args:
        pixels: largest difference of a box.
    """
    labels, boxes, scores = (recorded[f"{name}.{part}"] for part in ("labels", "boxes", "scores"))
    assert len(found["scores"]) == len(scores)
    for label in labels.unique():
        ours, theirs = found["labels"] == label, labels == label
        assert ours.sum() == theirs.sum()
        distance = torch.cdist(boxes[theirs], found["boxes"][ours], p=torch.inf)  # (n, n)
        nearest = distance.argmin(1)
        assert len(nearest.unique()) == len(nearest)
        assert distance.amin(1).max() < pixels
        assert (scores[theirs] - found["scores"][ours][nearest]).abs().max() < 1e-4


@pytest.mark.parametrize("make", [DinoDetrImageProcessor, DinoDetrImageProcessorPil])
@pytest.mark.parametrize(("variant", "file", "name", "nms"), CASES)
def test_detections_after_nms_are_the_recorded_ones(make, variant, file, name, nms):
    recorded, outputs, sizes = load(variant, file)
    detections = make(nms=nms).post_process_object_detection(outputs, threshold=-1, target_sizes=sizes)
    for image, found in enumerate(detections):
        assert_same_detections(found, recorded, f"{name}.{image}")
        assert found["scores"].diff().max() <= 0


def test_the_recordings_have_detections_whose_score_falls():
    """Otherwise the test above would also pass without NMS."""
    recorded, outputs, sizes = load("codetr/r50_5scale", "eval_outputs")
    plain = DinoDetrImageProcessor().post_process_object_detection(outputs, -1, sizes, top_k=40)
    changes = [(found["scores"] - recorded[f"post.{image}.scores"]).abs().max() for image, found in enumerate(plain)]
    assert max(changes) > 0.03
