"""Any detector on images of any size: the same answers in every batch, and errors of one sentence."""

import itertools
import json

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoModelForObjectDetection,
    ConditionalDetrConfig,
    ConditionalDetrImageProcessor,
    DeformableDetrConfig,
    DeformableDetrImageProcessor,
    DetrConfig,
    DetrImageProcessor,
    ResNetModel,
    RTDetrConfig,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    ViTImageProcessor,
    YolosConfig,
    YolosImageProcessor,
)

from dino_hf import DinoDetrForObjectDetection
from dino_hf.common.images import to_rgb
from dino_hf.inference import Detections, Predictor
from dino_hf.inference.predictor import _Prepared
from helpers import RESNET, tiny_config
from inference_toys import CATEGORY_IDS, NAMES, excite, noise, save_toy_detector, toy_detector

SIZES = [(70, 40), (90, 64), (40, 70), (80, 64), (100, 33), (71, 40), (64, 90)]  # (width, height)
IMAGES = [noise(*size, seed) for seed in range(2) for size in SIZES]


@pytest.fixture(scope="module")
def predictor():
    return Predictor(*toy_detector())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_toy_detector(tmp_path_factory.mktemp("model"))


def assert_same(found: list[Detections], expected: list[Detections]) -> None:
    for one, other in zip(found, expected, strict=True):
        # float32 arithmetic whose order depends on the size of the batch, through some 20 layers
        np.testing.assert_allclose(one.scores, other.scores, rtol=0, atol=1e-5)
        np.testing.assert_allclose(one.boxes, other.boxes, rtol=0, atol=1e-2)  # pixels
        np.testing.assert_array_equal(one.labels, other.labels)


def record_inputs(predictor: Predictor, monkeypatch) -> list[dict]:
    """The inputs of each batch to come, with a mask where there was none, and whether there was."""
    batches, forward = [], predictor.model.forward

    def record(**inputs):
        pixels = inputs["pixel_values"]
        mask = torch.ones(len(pixels), *pixels.shape[2:], dtype=torch.long)
        batches.append({"pixel_mask": mask, "has_mask": "pixel_mask" in inputs} | inputs)
        return forward(**inputs)

    monkeypatch.setattr(predictor.model, "forward", record)
    return batches


def test_an_image_has_the_same_detections_in_any_batch(predictor, monkeypatch):
    alone = [next(predictor([image])) for image in IMAGES]
    batches = record_inputs(predictor, monkeypatch)
    assert_same(list(predictor(IMAGES, batch_size=3)), alone)
    assert_same(list(predictor(IMAGES[::-1], batch_size=5)), alone[::-1])
    assert max(len(batch["pixel_values"]) for batch in batches) > 1
    assert not any(batch["has_mask"] for batch in batches)


def test_waiting_images_are_bounded_by_their_bytes(predictor, monkeypatch):
    shapes = [noise(60 + 7 * number, 40) for number in range(30)]  # no two alike: each waits for others of its shape
    num_read = 0

    def images():
        nonlocal num_read
        for image in shapes:
            num_read += 1
            yield image

    expected = list(predictor(shapes))
    held = 10 * (4 * 150 * 40 + 4 * 3 * 48 * 96)  # about ten of them, as they are and resized
    monkeypatch.setattr(predictor, "_window_bytes", held)
    monkeypatch.setattr(predictor, "_ahead_bytes", 1)
    stream = predictor(images(), batch_size=8)
    found = [next(stream)]
    assert num_read <= 16  # the first are smaller
    assert_same([*found, *stream], expected)


@pytest.mark.parametrize("limit", [1, 20])
def test_the_limit_keeps_the_best(predictor, limit):
    everything = next(predictor(IMAGES[:1]))
    assert_same([next(predictor(IMAGES[:1], max_detections=limit))], [everything.keep(np.arange(limit))])
    with pytest.raises(ValueError, match="max_detections=0 must be at least 1"):
        predictor(IMAGES, max_detections=0)


def test_the_limit_without_a_setting_is_300_or_the_number_of_queries(predictor):
    assert predictor.limit(None) == 300
    assert predictor.limit(7) == 7
    config = tiny_config(num_queries=301, id2label=NAMES)
    assert Predictor(DinoDetrForObjectDetection(config), predictor.image_processor).limit(None) == 301


def test_each_detection_tells_its_query_and_the_scores_of_all_classes(predictor):
    image = IMAGES[1]
    with torch.no_grad():
        outputs = predictor.model(**predictor.image_processor(images=[image], return_tensors="pt"))
    scores = outputs.logits[0].sigmoid().numpy()
    found = next(predictor([image], all_scores=True, threshold=float(np.quantile(scores, 0.5)), max_detections=60))
    assert 10 < len(found.scores) <= 60
    assert found.class_scores.shape == (len(found.scores), 5)
    np.testing.assert_allclose(found.class_scores, scores[found.queries], atol=1e-6)
    np.testing.assert_allclose(found.class_scores[np.arange(len(found.scores)), found.labels], found.scores, atol=1e-6)
    x, y, width, height = (outputs.pred_boxes[0].numpy()[found.queries] * np.array([90, 64] * 2)).T
    np.testing.assert_allclose(found.boxes.T, [x - width / 2, y - height / 2, x + width / 2, y + height / 2], atol=1e-3)
    assert len(found.keep(found.scores > found.scores[3]).queries) == 3
    assert next(predictor([image])).queries is None


def test_representations_are_short(predictor):
    found = next(predictor(IMAGES[:1]))
    assert repr(found).startswith("Detections(75, scores 0.")
    assert repr(Detections.sorted([], [], [])) == "Detections(0)"
    assert repr(predictor) == "Predictor('DinoDetrForObjectDetection', 5 classes, float32 on cpu)"


def test_it_is_what_the_model_says_of_the_image_alone(predictor, monkeypatch):
    exact = Predictor(predictor.model, predictor.image_processor)
    batches = record_inputs(exact, monkeypatch)
    found = list(exact(IMAGES, batch_size=4))
    assert not any(batch["has_mask"] for batch in batches)  # no work for padding
    assert max(len(batch["pixel_mask"]) for batch in batches) > 1
    for image, one in zip(IMAGES, found, strict=True):
        with torch.no_grad():
            outputs = exact.model(**exact.image_processor(images=[image], return_tensors="pt"))
        expected = exact.image_processor.post_process_object_detection(outputs, 0.0, [(image.height, image.width)])[0]
        assert_same([one], [Detections.sorted(*(expected[name].numpy() for name in ("boxes", "scores", "labels")))])


def test_detections_are_those_of_the_image_processor(predictor):
    image = noise(96, 64)
    inputs = predictor.image_processor(images=[image], return_tensors="pt")
    outputs = predictor.model(**inputs)
    expected = predictor.image_processor.post_process_object_detection(outputs, 0.0, [(64, 96)])[0]
    found = next(predictor([image]))
    assert_same([found], [Detections(*(expected[name].detach().numpy() for name in ("boxes", "scores", "labels")))])
    assert (found.boxes.dtype, found.scores.dtype, found.labels.dtype) == (np.float64, np.float64, np.int64)
    assert len(found.scores) == 15 * 5
    assert (np.diff(found.scores) <= 0).all()
    assert predictor.id2label == NAMES
    assert predictor.category_ids == CATEGORY_IDS


def test_images_are_read_as_they_are_needed(predictor):
    num_read = 0

    def endless():
        nonlocal num_read
        for number in itertools.count():
            num_read += 1
            yield IMAGES[number % len(SIZES)] if number % 5 else IMAGES[0]

    stream = predictor(endless(), batch_size=2)
    assert num_read == 0
    for count in range(1, 60):
        next(stream)
        assert num_read <= count + 8 * 2 + 9  # the window, and one for each of at most 8 threads
    stream.close()
    assert list(predictor([])) == []


def test_a_rare_shape_does_not_wait_for_others_of_its_kind(predictor, monkeypatch):
    batches = record_inputs(predictor, monkeypatch)
    images = [IMAGES[2]] + [IMAGES[0]] * 40
    next(predictor(iter(images), batch_size=2))
    assert [len(batch["pixel_values"]) for batch in batches].count(1) == 1
    assert len(batches) <= 9


def test_the_threshold_leaves_out_what_is_not_above(predictor):
    everything = list(predictor(IMAGES[:3]))
    threshold = float(everything[0].scores[20])
    with pytest.raises(ValueError, match=r"threshold=50 must be in \[0, 1\], .* For 50 %, write 0.5."):
        predictor(IMAGES, threshold=50)
    for found, of_all in zip(predictor(IMAGES[:3], threshold=threshold), everything, strict=True):
        assert_same([found], [of_all.keep(of_all.scores > threshold)])
    assert 0 < len(next(predictor(IMAGES[:1], threshold=threshold)).scores) <= 20


def test_grey_palette_and_alpha_are_read_as_in_training(predictor):
    image = IMAGES[0]
    for mode in ("L", "P", "RGBA", "CMYK", "1", "I"):
        converted = image.convert(mode)
        assert_same([next(predictor([converted]))], [next(predictor([to_rgb(converted)]))])
    with pytest.raises(OSError, match="It has 32 bits per pixel, mode 'F', of unknown range"):
        next(predictor([Image.new("F", (40, 30))]))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_half_precision_is_near_to_single(folder, predictor, dtype):
    half = Predictor(folder, dtype=dtype)
    assert {parameter.dtype for parameter in half.model.parameters()} == {half.model.dtype}
    assert half.model.dtype in (torch.bfloat16, torch.float16)
    for found, expected in zip(half(IMAGES[:4]), predictor(IMAGES[:4]), strict=True):
        # 8 bits of mantissa through some 20 layers, and selections among near equals
        np.testing.assert_allclose(found.scores[:20].mean(), expected.scores[:20].mean(), rtol=0.2)
        assert found.boxes.dtype == np.float64


def test_a_folder_gives_the_detections_of_what_was_saved_in_it(folder, predictor):
    loaded = Predictor(folder, device="cpu")
    assert loaded.name == str(folder)
    assert (loaded.id2label, loaded.category_ids) == (NAMES, CATEGORY_IDS)
    assert not loaded.model.training
    assert_same(list(loaded(IMAGES[:3])), list(predictor(IMAGES[:3])))


def test_scores_that_are_not_finite_are_no_silence(folder):
    broken = Predictor(folder)
    with torch.no_grad():
        for parameter in broken.model.model.decoder.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match=r'are not finite in float32; use dtype="float32" or "bfloat16"'):
        list(broken(IMAGES[:2]))


def test_what_does_not_fit_into_memory_goes_in_smaller_batches(predictor, monkeypatch):
    expected, forward, limit = list(predictor(IMAGES, batch_size=4)), predictor.model.forward, 2

    def out_of_memory(**inputs):
        if len(inputs["pixel_values"]) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(**inputs)

    monkeypatch.setattr(predictor.model, "forward", out_of_memory)
    assert_same(list(predictor(IMAGES, batch_size=4)), expected)
    limit = 0
    with pytest.raises(ValueError, match="A single image, resized to 84 x 48, does not fit into the memory of cpu"):
        list(predictor(IMAGES[:2]))


COMMON = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 12,
    "num_labels": 4,
}
TIMM_FREE = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
SHORTEST = {"shortest_edge": 64, "longest_edge": 128}


def resnet(*stages):
    return AutoConfig.for_model(**RESNET, out_features=list(stages))


def rt_detr():
    maps = {"out_features": ["stage2", "stage3", "stage4"]}
    backbone = RTDetrResNetConfig(embedding_size=8, hidden_sizes=[16, 24, 32, 40], depths=[1, 1, 1, 1], **maps)
    return RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[24, 32, 40],
        encoder_hidden_dim=32,
        decoder_in_channels=[32, 32, 32],
        num_denoising=0,
        **COMMON,
    )


def yolos():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return YolosConfig(image_size=[64, 96], patch_size=16, num_detection_tokens=10, num_labels=4, **sizes)


PEERS = {
    "detr": lambda: (
        DetrConfig(backbone_config=resnet("stage4"), **TIMM_FREE, **COMMON),
        DetrImageProcessor(size=SHORTEST),
    ),
    "conditional_detr": lambda: (
        ConditionalDetrConfig(backbone_config=resnet("stage4"), **TIMM_FREE, **COMMON),
        ConditionalDetrImageProcessor(size=SHORTEST),
    ),
    "deformable_detr": lambda: (
        DeformableDetrConfig(backbone_config=resnet("stage2", "stage3", "stage4"), **TIMM_FREE, **COMMON),
        DeformableDetrImageProcessor(size=SHORTEST),
    ),
    "rt_detr": lambda: (rt_detr(), RTDetrImageProcessor(size={"height": 64, "width": 96})),
    "yolos": lambda: (yolos(), YolosImageProcessor(size=SHORTEST)),
}


@pytest.fixture(scope="module", params=PEERS)
def peer(request):
    torch.manual_seed(0)
    config, image_processor = PEERS[request.param]()
    return Predictor(excite(AutoModelForObjectDetection.from_config(config), 0.1), image_processor)


def test_a_peer_gives_what_its_own_code_gives_for_each_image_alone(peer):
    model, image_processor = peer.model, peer.image_processor
    expected = []
    for image in IMAGES:
        outputs = model(**image_processor(images=[image], return_tensors="pt"))
        sizes = [(image.height, image.width)]
        one = image_processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)[0]
        expected.append(Detections.sorted(*(one[name].detach().numpy() for name in ("boxes", "scores", "labels"))))
    found = list(peer(IMAGES, batch_size=3))
    assert_same(found, expected)
    assert len(found[0].scores) >= 10
    assert not np.allclose(found[0].boxes[:5], found[2].boxes[:5])  # the image is looked at
    assert peer.category_ids is None


def test_an_image_like_a_thread_is_refused_where_nothing_would_be_left_of_it(peer):
    thread = Image.new("RGB", (3000, 2))
    if peer.can_scale:
        with pytest.raises(
            ValueError, match="It is 3000 x 2 pixels: resized for the model, its shorter side would have no pixel"
        ):
            list(peer([thread]))
    else:
        assert peer.refuses(thread) is None
        assert len(next(peer([thread])).boxes) > 0


def test_ours_sees_a_thread_too(predictor):
    assert predictor.refuses(Image.new("RGB", (3000, 2))) is None
    assert len(next(predictor([Image.new("RGB", (3000, 2))])).boxes) > 0


def test_at_another_scale_images_are_larger_and_boxes_stay_in_pixels_of_the_image(predictor, monkeypatch):
    batches = record_inputs(predictor, monkeypatch)
    larger = predictor.at_scale(2.0)
    found = next(larger([noise(96, 64)]))
    assert batches[-1]["pixel_mask"].sum() == (2 * 72) * (2 * 48)
    next(predictor([noise(96, 64)]))
    assert batches[-1]["pixel_mask"].sum() == 72 * 48
    assert 1 < found.boxes.max() < 200


def test_a_fixed_size_is_not_scaled():
    assert not Predictor(
        AutoModelForObjectDetection.from_config(rt_detr()), RTDetrImageProcessor(size={"height": 64, "width": 96})
    ).can_scale


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda:77"}, r"device='cuda:77' cannot be used here: .*; use 'cpu', or leave it out"),
        (
            {"device": "gpu"},
            "^device='gpu' cannot be used here: no device has that name; use 'cuda', 'cuda:1', 'mps' or 'cpu', or leave it out "
            r"to choose the fastest device\.$",
        ),
        ({"dtype": "int8"}, "dtype='int8' must be one of float32, bfloat16, float16."),
        ({"dtype": torch.int64}, "dtype=torch.int64 must be one of"),
    ],
)
def test_devices_and_types_that_are_not_there_are_refused(folder, settings, message):
    with pytest.raises(ValueError, match=message):
        Predictor(folder, **settings)


def test_wrong_settings_of_a_call_are_refused_at_once(predictor):
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        predictor(IMAGES, batch_size=0)
    for threshold in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"threshold=.* must be in \[0, 1\]"):
            predictor(IMAGES, threshold=threshold)


def test_a_model_without_a_folder_needs_an_image_processor():
    with pytest.raises(ValueError, match=r"was not loaded from a folder or the Hub, .* pass image_processor"):
        Predictor(toy_detector()[0])


def damage(name, change):
    def apply(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


def without_weights(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    save_file({name: value for name, value in weights.items() if "decoder" not in name}, folder / "model.safetensors")


def with_setting(**changes):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return apply


class _Call:
    """Pickled, what would be called by who loads it."""

    def __reduce__(self):
        return print, ("run",)


def with_pickled_call(folder):
    (folder / "model.safetensors").unlink()
    torch.save({"weight": _Call()}, folder / "pytorch_model.bin")


def replaced_by_another_model(folder):
    (folder / "model.safetensors").unlink()
    ResNetModel(AutoConfig.for_model(**RESNET)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (damage("model.safetensors", lambda data: data[: len(data) // 2]), "its model.safetensors may be damaged"),
        (damage("model.safetensors", lambda data: b"junk" * 9), "its model.safetensors may be damaged"),
        (damage("config.json", lambda data: data[:-20]), "config.json is not valid json: Unterminated string"),
        (
            damage("preprocessor_config.json", lambda data: data[:-20]),
            "preprocessor_config.json is not valid json: ",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "has a configuration but no weights; train it first"),
        (
            lambda folder: (folder / "preprocessor_config.json").unlink(),
            "has no preprocessor_config.json; save the image processor beside the model, with its save_pretrained.",
        ),
        (
            damage("preprocessor_config.json", lambda data: b"[]"),
            "preprocessor_config.json holds a list, but must hold an object",
        ),
        (with_pickled_call, "would run code; .* was saved as model.safetensors."),
        (
            lambda folder: (folder / "config.json").unlink(),
            "is not a model: it has no config.json; give the folder that",
        ),
        (lambda folder: ViTImageProcessor().save_pretrained(folder), "is not an image processor of a detector."),
        (replaced_by_another_model, "is a model of type 'resnet', which is not an object detector."),
        (without_weights, "lacks weights of the detector: .* are missing, the first is model.decoder"),
        (with_setting(d_model=128), "cannot be loaded; its model.safetensors may be damaged"),
        (with_setting(d_model=32), "cannot be loaded; its config.json may be damaged: ValueError, d_model=32 does not"),
        (with_setting(model_type="none", auto_map=None), "cannot be loaded; its config.json may be damaged"),
        (
            with_setting(model_type="none", auto_map={"AutoConfig": "code.Config"}),
            "code in a model's repository is never",
        ),
    ],
)
def test_a_broken_folder_is_described_in_a_sentence(tmp_path, break_it, message):
    save_toy_detector(tmp_path)
    break_it(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as raised:
        Predictor(tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_no_folder_and_not_on_the_hub_is_said(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for nowhere in (tmp_path / "none", "./none", "~/none/of/it", str(tmp_path / "none")):
        with pytest.raises(
            FileNotFoundError, match=f"There is no folder {nowhere}; give the folder of a model, or an id"
        ):
            Predictor(nowhere)
    with pytest.raises(ValueError, match="is a file; give its folder"):
        Predictor(folder / "config.json")
    with pytest.raises(
        FileNotFoundError, match="There is no folder none/there, and the Hub gives no model of that name"
    ):
        Predictor("none/there")
    (tmp_path / "checkpoint-12").mkdir()
    with pytest.raises(FileNotFoundError, match=r"it has a checkpoint: .*checkpoint-12"):
        Predictor(tmp_path)


def test_code_in_a_folder_is_never_run(tmp_path):
    save_toy_detector(tmp_path)
    for file in tmp_path.glob("*.py"):
        file.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert list(tmp_path.glob("*.py"))
    list(Predictor(tmp_path)(IMAGES[:2]))
    assert not (tmp_path / "ran").exists()


# The borders of what waits


def order_of_batches(predictor, monkeypatch, shapes, nbytes=1) -> list[int]:
    """Sizes of the batches, of at most two, in which images of these shapes are run."""
    ran = []

    def prepare(image):
        pixels = torch.empty((nbytes, *image.size[::-1]), dtype=torch.uint8, device="meta")
        return _Prepared(pixels, None, image.size[::-1])

    def detect(images, settings):
        ran.append(len(images))
        return [Detections.sorted(np.zeros((0, 4)), [], []) for _ in images]

    monkeypatch.setattr(predictor, "_prepare", prepare)
    monkeypatch.setattr(predictor, "_detect", detect)
    assert len(list(predictor([Image.new("RGB", shape) for shape in shapes], batch_size=2))) == len(shapes)
    return ran


@pytest.mark.parametrize(("num_between", "last"), [(14, [2]), (15, [1, 1, 1])])
def test_an_image_waits_for_its_shape_until_8_batches_are_read(num_between, last, predictor, monkeypatch):
    shapes = [(40, 30), *[(30, 40)] * num_between, (40, 30)]
    ran = order_of_batches(predictor, monkeypatch, shapes)
    assert ran == [2] * 7 + last


@pytest.mark.parametrize(("extra", "ran"), [(0, [2, 1]), (1, [1, 1, 1])])
def test_images_wait_up_to_half_a_gib_of_them(extra, ran, predictor, monkeypatch):
    """The first and second image, of other shapes, weigh half a GiB together, as they are and resized."""
    channels = (2**29 - 2 * 4 * 64 * 32) // (2 * 64 * 32)
    monkeypatch.setattr(
        "dino_hf.inference.predictor.num_bytes", lambda image: 4 * 64 * 32 + extra * (image.size == (32, 64))
    )
    shapes = [(64, 32), (32, 64), (64, 32)]
    assert order_of_batches(predictor, monkeypatch, shapes, channels) == ran


def test_images_of_a_quarter_of_a_gib_are_resized_ahead(predictor, monkeypatch):
    budgets = []

    def map_ahead(function, items, *, cost, budget):
        budgets.append(budget)
        return ((item, function(item)) for item in items)

    monkeypatch.setattr("dino_hf.inference.predictor.map_ahead", map_ahead)
    order_of_batches(predictor, monkeypatch, [(40, 30)])
    assert budgets == [2**28]


def test_an_image_has_300_detections_at_most_or_one_for_each_query(predictor, monkeypatch):
    assert predictor._num_queries < 300
    assert predictor.limit(None) == 300
    monkeypatch.setattr(predictor, "_num_queries", 301)
    assert predictor.limit(None) == 301
    assert predictor.limit(7) == 7
