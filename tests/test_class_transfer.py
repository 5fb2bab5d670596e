"""Other classes for a trained model: which rows stay, what the others are, and that nothing else changes."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForObjectDetection, ResNetConfig, ResNetModel

from dino_hf import DinoDetrForObjectDetection, DinoDetrModel
from dino_hf.common.class_names import _COCO_NAME, SYNONYMS, _normalised, match_names
from dino_hf.model.coco_classes import COCO_CLASSES, coco_id2label
from dino_hf.training import ClassTransfer, transfer_classes
from helpers import randomize, tiny_config, tiny_images

OLD = ["person", "airplane", "couch", "N/A", "tv", "cat", "N/A", "dog", "hot dog"]
NEW = ["Dog", "lynx", "aeroplane", "N/A", "hot-dog", "otter", "television", "TV", "sofa", "person", "raccoon"]
SOURCES = [7, None, 1, None, 8, None, 4, 4, 2, 0, None]
ALIKE = [index for index, source in enumerate(SOURCES) if source is not None]
FRESH = [index for index, source in enumerate(SOURCES) if source is None]
OLD_IDS, NEW_IDS = [1, 2, 4, 9, 16, 25, 36, 49, 64], [90 - index for index in range(len(NEW))]

OTHERS = {
    "VOC": [
        *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
        *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    ],
    "Cityscapes and BDD100K": [
        *("person", "pedestrian", "car", "truck", "bus", "train", "motorcycle", "bicycle", "traffic light"),
    ],
    "Open Images": [
        *("Airplane", "Television", "Couch", "Houseplant", "Kitchen & dining room table", "Mobile phone", "Cattle"),
        *("Computer keyboard", "Computer mouse", "Microwave oven", "Remote control", "Hair dryer", "Doughnut", "Ski"),
        *("Hot dog", "Wine glass", "Flying disc", "Fire hydrant", "Teddy bear"),
    ],
    "Objects365": [
        *(
            "Monitor/TV",
            "Dinning Table",
            "Handbag/Satchel",
            "Orange/Tangerine",
            "Bowl/Basin",
            "Cell Phone",
            "Hair Dryer",
        ),
    ],
    "LVIS": [
        *(
            "bus_(vehicle)",
            "car_(automobile)",
            "train_(railroad_vehicle)",
            "orange_(fruit)",
            "mouse_(computer_equipment)",
        ),
        *("computer_keyboard", "laptop_computer", "television_set", "cellular_telephone", "remote_control", "fireplug"),
        *("microwave_oven", "doughnut", "necktie", "sofa", "wineglass", "dining_table", "ski", "teddy_bear"),
    ],
}


def named(names) -> dict[int, str]:
    return dict(enumerate(names))


def make_model(kind=DinoDetrForObjectDetection, names=OLD, **changes):
    settings = {"num_labels": len(names), "id2label": named(names), "provenance": {"license": "apache-2.0"}, **changes}
    torch.manual_seed(0)
    model = kind(tiny_config(**settings))
    with torch.no_grad():
        for layer in class_layers(model).values():
            randomize(layer)
    return model


def class_layers(model) -> dict[str, nn.Module]:
    """Every layer with a row for each class, found by its form and not by the list in the code."""
    num_labels, layers = model.config.num_labels, {}
    for name, module in model.named_modules():
        if name.endswith(("class_head", "label_embedding")):
            assert len(module.weight) >= num_labels
            layers[name] = module
    return layers


def copied(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def random_states() -> list:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


def of_classes(name: str) -> bool:
    return "class_head" in name or "label_embedding" in name


@pytest.mark.parametrize("kind", [DinoDetrForObjectDetection, DinoDetrModel])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"share_decoder_heads": False, "num_extra_label_embeddings": 0},
        {"num_denoising": 0},
        {"num_extra_label_embeddings": 3, "share_decoder_heads": False},
    ],
    ids=str,
)
def test_each_row_is_that_of_the_old_class_or_that_of_a_fresh_model(kind, dtype, changes):
    model = make_model(kind, **changes).to(dtype)
    before = copied(model)
    transfer_classes(model, named(NEW), NEW_IDS)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(tensor.dtype == before[name].dtype for name, tensor in after.items())

    config, prefix = model.config, "" if kind is DinoDetrModel else "model."
    num_heads = 1 if config.share_decoder_heads else 3
    heads = ["query_selection.head", *(f"decoder.heads.{index}" for index in range(num_heads))]
    rows = [f"{prefix}{head}.class_head.{part}" for head in heads for part in ("weight", "bias")]
    rows += [f"{prefix}denoising.label_embedding.weight"] if config.num_denoising else []
    assert {name for name in before if of_classes(name)} == set(rows)
    for name in rows:
        old, new = before[name], after[name]
        extra = config.num_extra_label_embeddings if "embedding" in name else 0
        assert new.shape == (len(NEW) + extra, *old.shape[1:])
        for index in ALIKE:
            assert torch.equal(new[index], old[SOURCES[index]]), (name, index)
        assert torch.equal(new[len(NEW) :], old[len(OLD) :]), name
        fresh = new[FRESH].float()
        if name.endswith("bias"):
            assert torch.equal(fresh, torch.full((len(FRESH),), -math.log(99)).to(dtype).float())
        else:
            assert len({tuple(row) for row in fresh.tolist()}) == len(FRESH)  # no row twice
            if "embedding" in name:
                assert fresh.std().item() == pytest.approx(1, abs=0.2)  # of 320 draws: a standard error of 0.04
            else:
                bound = 1 / math.sqrt(config.d_model)
                assert 0.9 * bound < fresh.abs().max() <= bound * (1 + 2**-8)  # rounded to bfloat16
    for name, tensor in before.items():
        assert of_classes(name) or torch.equal(after[name], tensor), name
    weights = [after[name][FRESH] for name in rows if name.endswith("weight")]
    assert len({tuple(weight.flatten().tolist()) for weight in weights}) == len(weights)  # each layer has its own


@pytest.mark.parametrize("num_denoising", [0, 50])
def test_all_that_knows_the_number_of_classes_follows(num_denoising):
    model = make_model(num_denoising=num_denoising, category_ids=OLD_IDS)
    transfer_classes(model, {str(index): name for index, name in named(NEW).items()}, NEW_IDS)
    assert model.model.config is model.config
    assert model.config.num_labels == len(NEW)
    assert model.config.id2label == named(NEW)
    assert model.config.label2id == {name: index for index, name in enumerate(NEW) if name != "N/A"}
    assert model.config.category_ids == NEW_IDS
    assert model.config.provenance == {"license": "apache-2.0"}
    for name, layer in class_layers(model).items():
        if "embedding" in name:
            assert layer.num_embeddings == len(layer.weight) == len(NEW) + 1
        else:
            assert layer.out_features == len(layer.weight) == len(layer.bias) == len(NEW)
    if num_denoising:
        assert model.model.denoising.num_labels == len(NEW)
    transfer_classes(model, named(OLD))
    assert model.config.category_ids is None  # none given: those of the classes before mean nothing


def test_back_and_forth_keeps_what_both_know():
    model = make_model()
    before = copied(model)
    transfer_classes(model, named(NEW))
    transfer_classes(model, named(OLD))
    name = "model.query_selection.head.class_head.weight"
    same = [index for index in range(len(OLD)) if torch.equal(model.state_dict()[name][index], before[name][index])]
    assert same == sorted({source for source in SOURCES if source is not None})


def test_the_result_tells_what_became_of_each_class():
    kept = {
        "Dog": "dog",
        "aeroplane": "airplane",
        "hot-dog": "hot dog",
        "television": "tv",
        "TV": "tv",
        "sofa": "couch",
    }
    transfer = transfer_classes(make_model(), named(NEW))
    assert transfer == ClassTransfer(kept | {"person": "person"}, ["lynx", "otter", "raccoon"], ["cat"])


def test_the_result_prints_as_three_lines():
    transfer = transfer_classes(make_model(), {0: "person", 1: "lynx", 2: "sofa"})
    assert str(transfer) == (
        "Kept 2 of 3 classes: person, sofa (was couch)\nNew: lynx\nDropped: airplane, tv, cat, dog, hot dog"
    )
    long = ClassTransfer(kept={}, new=[f"n{index}" for index in range(12)], dropped=[])
    assert f"{long}" == (
        "Kept 0 of 12 classes: none\nNew: n0, n1, n2, n3, n4, n5, n6, n7, n8, n9 and 2 more\nDropped: none"
    )


def test_new_rows_depend_on_the_seed_of_the_caller():
    states = []
    for seed in (1, 1, 2):
        model = make_model(share_decoder_heads=False)
        torch.manual_seed(seed)
        transfer_classes(model, named(NEW))
        states.append(copied(model))
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    heads = [name for name in states[0] if name.endswith("class_head.weight")]
    assert heads
    assert not any(torch.equal(states[0][name], states[2][name]) for name in heads)


@pytest.mark.parametrize("frozen", ["class_head", "label_embedding", "query_selection", ""])
def test_what_is_frozen_stays_frozen(frozen):
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = frozen not in name
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    transfer_classes(model, named(NEW))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.is_leaf for parameter in model.parameters())


@pytest.mark.parametrize("changes", [{}, {"share_decoder_heads": False}, {"num_denoising": 0}], ids=str)
def test_a_model_with_other_classes_trains_saves_and_loads(changes, tmp_path):
    model = make_model(**changes)
    inputs = tiny_images()
    model.eval()(*inputs)
    transfer_classes(model, named(NEW), NEW_IDS)
    labels = [
        {"class_labels": torch.tensor([len(NEW) - 1, 0]), "boxes": torch.tensor([[0.4, 0.5, 0.2, 0.3]] * 2)},
        {"class_labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
    ]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = copied(model)
    outputs = model.train()(*inputs, labels)
    outputs.loss.backward()
    optimizer.step()
    assert outputs.logits.shape == (2, 15, len(NEW))
    assert ("loss_ce_dn" in outputs.loss_dict) == bool(model.config.num_denoising)
    for name, layer in class_layers(model).items():
        assert not torch.equal(layer.weight, before[f"{name}.weight"]), name

    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert (loaded.config.id2label, loaded.config.category_ids) == (named(NEW), NEW_IDS)
    expected, got = model.eval()(*inputs), loaded(*inputs)
    assert torch.equal(got.logits, expected.logits)
    assert torch.equal(got.pred_boxes, expected.pred_boxes)


def test_kept_classes_score_as_before():
    model, inputs = make_model().eval(), tiny_images()
    # Which tokens become queries depends on the best class of all; with as many queries as tokens, only their order does.
    model.model.query_selection.num_queries = 142
    model.model.query_selection.content = nn.Embedding(142, 64)
    before = model(*inputs).enc_topk_logits
    transfer_classes(model, named(NEW))
    after = model(*inputs).enc_topk_logits
    for index in ALIKE:
        expected = before[..., SOURCES[index]].sort(1).values
        # one matrix product of another shape in float32
        torch.testing.assert_close(after[..., index].sort(1).values, expected, rtol=0, atol=1e-5)


def test_the_91_outputs_of_the_release_and_the_80_classes_of_coco_are_one_class_space():
    model = make_model(names=list(coco_id2label().values()))
    before = copied(model)
    transfer = transfer_classes(model, named(COCO_CLASSES.values()), list(COCO_CLASSES))
    assert (len(transfer.kept), transfer.new, transfer.dropped) == (80, [], [])
    for name, tensor in model.state_dict().items():
        if "class_head" in name:
            assert torch.equal(tensor, before[name][list(COCO_CLASSES)]), name
    assert model.config.category_ids == list(COCO_CLASSES)
    transfer = transfer_classes(model, coco_id2label(), range(91))
    assert (len(transfer.kept), transfer.new, transfer.dropped) == (80, [], [])
    assert model.config.id2label == coco_id2label()


@pytest.mark.parametrize("names", OTHERS.values(), ids=OTHERS)
def test_names_of_other_data_sets_are_those_of_coco(names):
    coco = list(COCO_CLASSES.values())
    found = {
        name: None if index is None else coco[index]
        for name, index in zip(names, match_names(coco, names), strict=True)
    }
    assert None not in found.values(), found
    pairs = {"aeroplane": "airplane", "tvmonitor": "tv", "Flying disc": "frisbee", "fireplug": "fire hydrant"}
    assert {name: found[name] for name in pairs if name in found} == {
        name: pairs[name] for name in pairs if name in found
    }
    assert match_names(names, [found[name] for name in names]).count(None) == 0  # and the other way around


@pytest.mark.parametrize(
    "name",
    [
        "bike",
        "motor",
        "rider",
        "van",
        "plane",
        "mug",
        "monitor",
        "ball",
        "traffic sign",
        "bow-tie",
        "glasses",
        "N/A",
        "n/a",
        "",
    ],
)
def test_names_that_could_mean_something_else_match_nothing(name):
    assert match_names([*COCO_CLASSES.values(), "N/A", "-"], [name]) == [None]


def test_synonyms_are_of_classes_of_coco_and_of_one_class_only():
    coco = {_normalised(name) for name in COCO_CLASSES.values()}
    assert len(coco) == 80
    assert {_normalised(name) for name in SYNONYMS} <= coco
    written = [_normalised(name) for names in SYNONYMS.values() for name in names]
    assert len(set(written)) == len(written) == len(_COCO_NAME)
    assert not set(written) & coco


def test_the_most_exact_match_wins_and_of_equal_ones_the_first():
    names = ["television", "TV", "tv", "t v", "Tv-Monitor"]
    assert match_names(names, ["tv"]) == [2]
    assert match_names(names, ["TV", "T_V", "Television", "tvmonitor"]) == [1, 1, 0, 4]
    assert match_names(names, ["monitor/tv"]) == [0]
    assert match_names(["mobile phone", "cellular telephone"], ["cell phone"]) == [0]
    assert match_names(["-", "_", "+"], ["_", "+", " "]) == [1, 2, None]
    assert match_names(["N/A", "cat", "n/a"], ["N/A", "CAT", "cat", "n/a"]) == [None, 1, 1, 2]


WRONG = {
    "list": ((["cat", "dog"],), r"id2label is a list, .*dict\(enumerate\(names\)\)"),
    "gaps": (({0: "cat", 2: "dog"},), r"id2label has the keys \[0, 2\]"),
    "from 1": (({1: "cat", 2: "dog"},), r"id2label has the keys \[1, 2\]"),
    "empty": (({},), r"id2label has the keys \[\]"),
    "label2id": (({"cat": 0, "dog": 1},), r"id2label has the keys \['cat', 'dog'\], .* is label2id"),
    "one index twice": (({0: "cat", "0": "dog"},), r"id2label has the keys \[0\]"),
    "no names": (({0: "cat", 1: None},), r"id2label has the names \[None\], but names must be strings"),
    "one name twice": (({0: "cat", 1: "dog", 2: "cat"},), r"the names \['cat'\] more than once"),
    "too few ids": (({0: "cat", 1: "dog"}, [3]), "category_ids has 1 entries for 2 classes; give one for each"),
    "too many ids": (({0: "cat"}, [3, 4]), "category_ids has 2 entries for 1 classes"),
    "one id twice": (({0: "cat", 1: "dog"}, [3, 3]), r"category_ids=\[3, 3\] has one id twice"),
    "ids that are no numbers": (({0: "cat", 1: "dog"}, [3, "4"]), r"category_ids=\[3, '4'\] must be whole numbers"),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_classes_are_refused_and_the_model_stays_as_it_was(arguments, message):
    model = make_model(category_ids=OLD_IDS)
    tensors, config, parameters = copied(model), model.config.to_dict(), list(model.parameters())
    with pytest.raises(ValueError, match=message):
        transfer_classes(model, *arguments)
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.model.denoising.num_labels == len(OLD)


def test_ids_may_come_from_numpy():
    model = make_model()
    transfer_classes(model, named(NEW), np.array(NEW_IDS))
    assert model.config.category_ids == NEW_IDS
    assert {type(one) for one in model.config.category_ids} == {int}


def test_another_model_is_refused():
    others = [nn.DataParallel(make_model()), None]
    others.append(ResNetModel(ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8, layer_type="basic")))
    for other in others:
        with pytest.raises(
            ValueError, match=f"model is a {type(other).__name__}, but must be a DinoDetrForObjectDetection"
        ):
            transfer_classes(other, named(NEW))


def test_a_head_that_is_not_our_layer_any_more_is_refused():
    model = make_model()
    model.model.decoder.heads[0].class_head = nn.Sequential(model.model.decoder.heads[0].class_head)
    with pytest.raises(ValueError, match=r"A class head is a Sequential.*before the model is quantized"):
        transfer_classes(model, named(NEW))


def test_a_config_that_no_longer_fits_its_model_is_refused():
    model = make_model()
    model.config.id2label = named(NEW)
    with pytest.raises(ValueError, match=r"9 outputs, but model\.config\.id2label names 11 classes"):
        transfer_classes(model, named(NEW))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_model_on_a_gpu_gets_the_same_rows_there():
    on_cpu, on_gpu = make_model(), make_model().cuda()
    transfer_classes(on_cpu, named(NEW))
    before = torch.cuda.get_rng_state()
    transfer_classes(on_gpu, named(NEW))
    assert torch.equal(torch.cuda.get_rng_state(), before)
    for name, tensor in on_gpu.state_dict().items():
        assert tensor.is_cuda, name
        assert torch.equal(tensor.cpu(), on_cpu.state_dict()[name]), name


def test_placeholders_are_no_names():
    """Two models without class names have nothing in common."""
    assert match_names(["LABEL_0", "cat", "LABEL_2"], ["LABEL_0", "LABEL_2", "cat", "label_0"]) == [None, None, 1, None]
