"""More or fewer queries for a trained detector: rows of the content, and everything that follows their number."""

import copy

import pytest
import torch
from PIL import Image
from torch import nn

import dino_hf
from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor, DinoDetrModel, set_num_queries
from dino_hf.inference.predictor import Predictor
from helpers import randomize, tiny_config, tiny_images, tiny_labels

OLD = 7


def make_model(**settings) -> DinoDetrForObjectDetection:
    torch.manual_seed(0)
    return randomize(DinoDetrForObjectDetection(tiny_config(num_queries=OLD, **settings)), scale=0.2).eval()


@pytest.mark.parametrize("number", [3, 7, 10, 25])
def test_rows_are_kept_in_the_order_of_the_proposals_and_the_second_half_is_repeated(number):
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    set_num_queries(model, number)
    after = model.state_dict()
    name = "model.query_selection.content.weight"
    expected = torch.cat([before[name], *[before[name][OLD // 2 :]] * 5])[:number]
    assert torch.equal(after[name], expected)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if key != name)
    outputs = model(*tiny_images())
    assert outputs.logits.shape[1] == outputs.pred_boxes.shape[1] == outputs.enc_topk_logits.shape[1] == number
    assert model.config.num_queries == model.model.config.num_queries == number


def test_proposals_of_the_old_number_stay_the_first():
    model = make_model()
    images = tiny_images()
    before = model(*images).enc_topk_bboxes
    set_num_queries(model, 20)
    after = model(*images).enc_topk_bboxes
    assert torch.equal(after[:, :OLD], before)
    set_num_queries(model, OLD)
    torch.testing.assert_close(model(*images).enc_topk_bboxes, before, rtol=0, atol=0)


def test_the_model_is_saved_and_loaded_with_its_new_number(tmp_path):
    model = make_model()
    set_num_queries(model, 11)
    model.save_pretrained(tmp_path)
    loaded, info = DinoDetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert loaded.config.num_queries == loaded.model.query_selection.content.num_embeddings == 11
    images = tiny_images()
    assert torch.equal(loaded.eval()(*images).logits, model(*images).logits)


def test_training_with_denoising_reaches_every_new_row():
    model = make_model(num_denoising=5)
    set_num_queries(model, 12)
    model.train()
    outputs = model(*tiny_images(), labels=tiny_labels(3, 0))
    outputs.loss.backward()
    gradient = model.model.query_selection.content.weight.grad
    assert gradient.shape[0] == 12
    assert gradient.abs().sum(-1).all()


def test_dtype_and_freezing_are_kept():
    model = make_model().to(torch.bfloat16)
    model.model.query_selection.content.weight.requires_grad_(False)
    set_num_queries(model, 9)
    weight = model.model.query_selection.content.weight
    assert (weight.dtype, weight.requires_grad) == (torch.bfloat16, False)


def test_a_base_model_and_pure_query_selection_are_changed_too():
    base = DinoDetrModel(tiny_config(num_queries=OLD)).eval()
    set_num_queries(base, 9)
    assert base(*tiny_images()).enc_topk_logits.shape[1] == base.config.num_queries == 9
    pure = make_model(mixed_query_selection=False)
    set_num_queries(pure, 9)
    assert pure(*tiny_images()).logits.shape[1] == 9


def test_more_than_300_detections_are_kept():
    model = make_model()
    set_num_queries(model, 400)
    processor = DinoDetrImageProcessor(size={"shortest_edge": 160, "longest_edge": 260})
    image = torch.randint(0, 256, (3, 160, 260), dtype=torch.uint8)
    picture = Image.fromarray(image.numpy().transpose(1, 2, 0))
    found = next(iter(Predictor(model, processor, device="cpu")([picture], threshold=0.0)))
    assert len(found.scores) == 400
    inputs = processor(image, return_tensors="pt")
    outputs = model(**inputs)
    assert outputs.logits.shape[1] == 400
    sizes = [(160, 260)]
    kept = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes, top_k=1000)[0]
    assert len(kept["scores"]) == 1000
    assert len(processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)[0]["scores"]) == 300


def test_a_small_image_gives_as_many_detections_as_its_maps_have_cells():
    model = make_model()
    set_num_queries(model, 2000)
    pixel_values = torch.randn(2, 3, 64, 104)
    cells = 8 * 13 + 4 * 7 + 2 * 4 + 1 * 2
    assert model(pixel_values).logits.shape[1] == cells
    model.train()
    assert model(pixel_values, labels=tiny_labels(3, 0)).loss.isfinite()


@pytest.mark.parametrize(
    ("number", "message"),
    [(0, "num_queries=0 must be at least 1"), (100_001, "larger than 100000"), (2.5, "2.5 must be a whole number"),
     (True, "True must be a whole number")],
)  # fmt: skip
def test_a_wrong_number_changes_nothing(number, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        set_num_queries(model, number)
    assert model.config.num_queries == len(model.model.query_selection.content.weight) == OLD


def test_other_models_and_replaced_layers_are_refused():
    with pytest.raises(ValueError, match="model is a Linear"):
        set_num_queries(nn.Linear(2, 3), 5)
    model = make_model()
    model.model.query_selection.content = nn.Linear(64, OLD)
    with pytest.raises(ValueError, match=r"content of the queries is a Linear.*before the model is quantized"):
        set_num_queries(model, 5)
    assert model.config.num_queries == OLD


def test_it_is_a_public_name():
    assert dino_hf.set_num_queries is set_num_queries
