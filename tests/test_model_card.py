"""The card says what the configuration knows and nothing else, and nobody's own card is lost."""

import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.repocard_data import model_index_to_eval_results
from markdown_it import MarkdownIt
from PIL import Image

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor, DinoDetrModel
from dino_hf.model.coco_classes import COCO_CLASSES, coco_class_space
from dino_hf.runtime.card_sections import TAGS
from dino_hf.runtime.model_card import is_ours, model_card
from dino_hf.runtime.weights_digest import weights_digest
from dino_hf.training import transfer_classes
from helpers import BIT, NUM_LABELS, RESNET, SWIN, TIMM, randomize, tiny_config

CONVERTED = {
    "project": "original",
    "file": "checkpoint0011_4scale.pth",
    "sha256": "0123456789abcdef",
    "published": "DINO-4scale, R50, 12 epochs",
    "published_ap": 49.0,
    "url": "https://example.org/checkpoint0011_4scale.pth",
    "assumed": {"position_temperature": 20},
}
TRAINING = {
    "dataset": "birds",
    "num_images": 1200,
    "recipe": {"learning_rate": 1e-4, "max_grad_norm": 0.1},
    "evaluation": {
        "dataset": "other birds",
        "num_images": 40,
        "metrics": {"AP": 0.41234, "AP50": 0.6, "AP75": 0.5, "AP_small": -1, "AR_100": 0.7, "AP_class_a|b": 0.3},
    },
}


MEASURED_AFTER = {
    "dataset": "other birds",
    "num_images": 40,
    "step": 9,
    "after_training": True,
    "metrics": {"AP": 0.41234, "AP50": 0.6, "AR_100": 0.7, "AP_class_a|b": 0.3, "AP_class_crow": -1},
    "intervals": {"AP": [0.35, 0.4781], "AP_class_a|b": [0.2, 0.4]},
    "objects": {"a|b": 31, "crow": 0},
    "best": {"threshold": 0.314159, "f1": 0.5, "precision": 0.6, "recall": 0.43},
    "pictures": {"curves.png": "Loss [and] AP", "gone.png": "Not here", "../secret.png": "Elsewhere"},
    "test": {"dataset": "more birds", "num_images": 70, "metrics": {"AP": 0.39}, "intervals": {"AP": [0.3, 0.5]}},
}


def card_of(provenance=None, name="someone/birds", tags=(), **changes) -> tuple[ModelCard, str]:
    """The card as the Hub reads it, and its words in one line."""
    if "id2label" in changes:
        changes["num_labels"] = len(changes["id2label"])
    config = tiny_config(**changes)
    config.__dict__["provenance"] = provenance  # past the check of its type, as from a file that somebody wrote
    text = model_card(config, 47_600_000, name, tags)
    assert is_ours(text)
    return ModelCard(text), " ".join(text.split())


def test_metadata_are_what_the_hub_wants():
    card, _ = card_of()
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "object-detection",
        "tags": list(TAGS),
    }


def test_architecture():
    _, text = card_of()
    assert "# DINO object detector: ResNet of depths 1-1-1-1, 4 scales" in text
    assert "| queries | 15 |" in text
    assert "| layers | 2 encoder, 3 decoder |" in text
    assert "| parameters | 47.6 M |" in text
    assert "Swin of depths 1-1-1-1" in card_of(backbone_config=SWIN)[1]
    assert "timm resnet18" in card_of(backbone_config=TIMM)[1]


def test_weights_of_which_nothing_is_known():
    card, text = card_of()
    assert "There is no record of where the weights come from. They may be random" in text
    assert "No licence of the weights is recorded." in text
    assert "AP" not in text.replace("AP_", "")
    assert card.data.eval_results is None


def test_converted_weights_have_a_published_ap_that_nobody_here_measured():
    card, text = card_of({"converted_from": CONVERTED, "license": "apache-2.0"})
    assert (
        "converted from the file `checkpoint0011_4scale.pth` (sha256 `0123456789abcdef`) of the original release"
        in text
    )
    assert "published as DINO-4scale, R50, 12 epochs." in text
    assert "**Published AP: 49.0**, reported by its authors and not measured by us." in text
    assert "These were assumed: `position_temperature=20`." in text
    assert "Weights: apache-2.0." in text
    assert "may be random" not in text
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results is None
    assert "model-index" not in card.data.to_dict()


@pytest.mark.parametrize("project", ["detrex", "mmdet", "a fork"])
def test_the_project_of_the_file_is_named(project):
    _, text = card_of({"converted_from": {"project": project}})
    assert {"detrex": "of detrex (", "mmdet": "of MMDetection (", "a fork": "of a fork."}[project] in text


def test_after_training_the_published_ap_is_the_bases():
    provenance = {"converted_from": CONVERTED, "base_model": "someone/dino-r50", "training": TRAINING}
    card, text = card_of(provenance)
    assert "not measured by us. It belongs to that file and not to the weights here." in text
    assert "trained on 1,200 images of `birds`, starting from `someone/dino-r50`" in text
    assert "| learning rate | 0.0001 |" in text
    assert "on 40 images of `other birds`" in text
    assert "| AP, mean over IoU 0.50 to 0.95 | 0.412 |" in text
    assert r"| AP of a\|b | 0.300 |" in text
    assert "small" not in text  # -1: there was nothing to measure
    assert card.data.base_model == "someone/dino-r50"
    assert "datasets" not in card.data.to_dict()  # a name, not a repository


def test_only_what_was_measured_is_in_the_model_index(tmp_path):
    config = tiny_config(provenance={"converted_from": CONVERTED, "training": TRAINING})
    (tmp_path / "card.md").write_text(model_card(config, 1, "someone/birds"))
    card = ModelCard.load(tmp_path / "card.md")
    name, results = model_index_to_eval_results(card.data.to_dict()["model-index"])
    assert name == "birds"
    assert [(one.metric_name, one.metric_value) for one in results] == [
        ("AP, mean over IoU 0.50 to 0.95", 0.4123),
        ("AP at IoU 0.50", 0.6),
        ("AP at IoU 0.75", 0.5),
    ]
    assert {one.dataset_name for one in results} == {"other birds"}
    assert {one.task_type for one in results} == {"object-detection"}
    assert "49" not in str(card.data)


def test_an_ap_of_earlier_weights_is_not_this_models():
    evaluation = {**TRAINING["evaluation"], "step": 100}
    card, text = card_of({"training": {**TRAINING, "steps": 150, "evaluation": evaluation}})
    assert (
        "It was measured at step 100; these weights are from step 150. AP was not measured with these weights." in text
    )
    assert card.data.eval_results is None
    card, text = card_of({"training": {**TRAINING, "steps": 100, "evaluation": evaluation}})
    assert "was not measured" not in text
    assert len(card.data.eval_results) == 3


def test_training_without_evaluation_claims_nothing():
    card, text = card_of({"training": {"dataset": "someone/birds"}})
    assert "No AP of these weights was recorded." in text
    assert "starting from weights without a record" in text
    assert card.data.datasets == ["someone/birds"]
    assert card.data.eval_results is None


def test_folders_are_no_repositories(tmp_path):
    (tmp_path / "base").mkdir()
    card, text = card_of({"base_model": str(tmp_path / "base")})
    assert "made from `base`" in text
    assert str(tmp_path) not in text
    assert "base_model" not in card.data.to_dict()


def test_a_licence_that_is_no_identifier():
    card, text = card_of({"license": "Ask my boss"})
    assert "Weights: Ask my boss." in text
    assert (card.data.license, card.data.license_name) == ("other", "Ask my boss")


def test_classes():
    names, ids = coco_class_space(91)
    _, text = card_of(id2label=names, category_ids=ids)
    assert "91 outputs for the 80 categories of COCO. The class index is the raw COCO category id" in text
    assert "person, bicycle" in text
    assert "N/A," not in text
    names, ids = coco_class_space(80)
    _, text = card_of(id2label=names, category_ids=ids)
    assert "The 80 categories of COCO, ordered by their ids." in text
    assert "`config.category_ids`" in text
    assert "stop sign (13)" in text
    _, text = card_of(id2label={0: "duck", 1: "go|ose"}, category_ids=[3, 7])
    assert "2 classes. A number in parentheses is the category id in the training annotations" in text
    assert r"duck (3), go\|ose (7)" in text
    assert "2 classes. duck, goose" in card_of(id2label={0: "duck", 1: "goose"}, category_ids=None)[1]
    assert "5 classes, whose names were not recorded." in card_of()[1]
    many = card_of(id2label={index: f"thing {index}" for index in range(1203)})[1]
    assert "thing 399, and 803 more in `config.id2label`" in many
    assert len(COCO_CLASSES) == 80


BAD_METRICS = {"AP": "high", 3: None, "AP50": float("nan")}


@pytest.mark.parametrize(
    ("provenance", "named"),
    [
        ([], "`provenance`"),
        ("original", "`provenance`"),
        ({"converted_from": "original"}, "`converted_from`"),
        ({"converted_from": {**CONVERTED, "file": 3}}, "`converted_from.file`"),
        ({"converted_from": {**CONVERTED, "published_ap": "49"}}, "`converted_from.published_ap`"),
        ({"license": ["mit"], "base_model": {}}, "`base_model`, `license`"),
        ({"converted_from": CONVERTED, "training": [TRAINING]}, "`training`"),
        ({"training": {"num_images": True, "recipe": "paper"}}, "`training.num_images`, `training.recipe`"),
        ({"training": {"evaluation": 0.4}}, "`training.evaluation`"),
        (
            {"training": {**TRAINING, "evaluation": {"metrics": BAD_METRICS}}},
            "`training.evaluation.metrics.AP`, `training.evaluation.metrics.AP50`",
        ),
    ],
)
def test_what_cannot_be_read_is_named_and_claims_nothing(provenance, named):
    card, text = card_of(provenance)
    assert f"These entries of `config.provenance` could not be read and are left out: {named}." in text
    assert card.data.eval_results is None
    if isinstance(provenance, dict) and "training" in provenance:
        assert "The weights here were trained" in text


def test_results_of_a_run_are_told_with_intervals_threshold_and_pictures(tmp_path):
    (tmp_path / "curves.png").touch()
    (tmp_path.parent / "secret.png").touch()
    training = {**TRAINING, "steps": 9, "selected": "those after step 9", "evaluation": MEASURED_AFTER}
    config = tiny_config(provenance={"start": "random weights", "training": training})
    text = model_card(config, 1, "birds", folder=tmp_path)
    words = " ".join(text.split())
    for part in (
        "starting from random weights. They are those after step 9.",
        "Measured after training, on 40 images of `other birds`. Intervals are 95 % bootstrap intervals over the images.",
        "| AP, mean over IoU 0.50 to 0.95 | 0.412 | 0.350 to 0.478 |",
        "| AP at IoU 0.50 | 0.600 | |",
        "**Best threshold: 0.31**. There, F1 over all classes is highest: 0.500, with precision 0.600 and recall 0.430",
        "On 70 images of `more birds`, which were not used to choose anything: **AP 0.390** (0.300 to 0.500).",
        "| a\\|b | 31 | 0.300 | 0.200 to 0.400 | | crow | 0 | | |",
        "![Loss (and) AP](curves.png)",
        'detector("street.jpg", threshold=0.31)',
    ):
        assert part in words, part
    assert "AP of a" not in words  # the classes have a table of their own
    assert "gone.png" not in words
    assert "secret" not in words
    assert is_ours(text)

    elsewhere = model_card(config, 1, "birds")  # pushed from memory, for instance
    assert "curves.png" not in elsewhere
    changed = tiny_config(provenance={"training": {**training, "steps": 10}})
    text = model_card(changed, 1, "birds", folder=tmp_path)
    assert "It was measured at step 9; these weights are from step 10. AP was not measured" in text
    assert "curves.png" not in text
    assert "threshold=0.4)" in text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"intervals": {"AP": [0.1]}}, "`training.evaluation.intervals.AP`"),
        ({"intervals": {"AP": ["low", 0.2]}}, "`training.evaluation.intervals.AP`"),
        ({"objects": {"crow": "many"}}, "`training.evaluation.objects.crow`"),
        ({"best": 0.3}, "`training.evaluation.best`"),
        ({"pictures": ["curves.png"]}, "`training.evaluation.pictures`"),
        ({"test": {"metrics": {"AP": "high"}}}, "`training.evaluation.test.metrics.AP`"),
    ],
)
def test_results_that_cannot_be_read_are_named(changes, named):
    _, text = card_of({"training": {**TRAINING, "steps": 9, "evaluation": {**MEASURED_AFTER, **changes}}})
    assert f"could not be read and are left out: {named}." in text


def test_an_empty_record_claims_nothing():
    assert "converted from a file." in card_of({"converted_from": {}})[1]


def test_text_of_others_stays_text():
    provenance = {"converted_from": {"file": "a`b\n# Title", "published": "<!-- x -->\n---\n"}, "license": "---\nx: y"}
    card, text = card_of(provenance, id2label={0: "<script>", 1: "two\nlines"})
    assert "`a'b # Title`" in text
    assert "<script>" not in text
    assert "two lines" in text
    assert card.data.license_name == "--- x: y"


def rendered_kinds(text: str) -> set[str]:
    """The kinds of Markdown elements in a card's body, without the marker at its end."""
    body = text.split("\n---\n", 1)[1].rpartition("<!-- Written by")[0]
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(body)
    return {child.type for token in tokens for child in (token, *(token.children or ()))}


STRANGERS = (
    "![](https://evil.example/pixel.png)",
    "[free](https://evil.example)",
    "x <script>alert(1)</script>",
    "x> <img src=https://evil.example/p.png> <x",
    "`` <b> ``",
    'x") ; import os\n```\n<img src=x>',
    "|a|<b>",
)


@pytest.mark.parametrize("text", STRANGERS)
def test_no_html_or_picture_of_a_stranger_gets_into_the_card(text):
    """Wherever a record, a configuration or a folder can hold text."""
    keys = ("project", "file", "sha256", "url", "weights", "published")
    training = {**TRAINING, "steps": 9, "dataset": text, "selected": text, "recipe": {text: text}}
    evaluation = {
        **MEASURED_AFTER,
        "dataset": text,
        "weights": text,
        "metrics": {"AP": 0.4, text: 0.3, f"AP_class_{text}": 0.2},
        "objects": {text: 3},
        "pictures": {text: text, "a.png": text},
        "intervals": {text: text},
    }
    provenance = {
        "converted_from": {**dict.fromkeys(keys, text), "published_ap": 3, "assumed": {text: text}},
        "base_model": text,
        "license": text,
        "start": text,
        "training": {**training, "evaluation": evaluation},
    }
    converted_only = {"converted_from": provenance["converted_from"], "base_model": text, "license": text}
    for record in (provenance, converted_only, {"training": {**training, "start": text}}, {text: {text: text}}):
        config = tiny_config(provenance=record)
        config.id2label = {0: text, 1: "b"}
        card = model_card(config, 1, f"folder {text}")
        assert not rendered_kinds(card) & {"html_inline", "html_block", "image"}, card
        assert len(re.findall("^```", card, re.MULTILINE)) == 4


def test_only_a_plain_address_becomes_a_link():
    assert (
        "Source: <https://example.org/a?b=1#c>."
        in card_of({"converted_from": {"url": "https://example.org/a?b=1#c"}})[1]
    )
    assert "Source: `javascript:alert(1)`." in card_of({"converted_from": {"url": "javascript:alert(1)"}})[1]


def test_a_card_is_bounded():
    names = {index: f"{index} " + "x" * 10_000 for index in range(1000)}
    metrics = {"AP": 0.4} | {f"AP_class_{name}": 0.1 for name in names.values()}
    many = {f"key{number}": "y" * 10_000 for number in range(1000)}
    evaluation = {**MEASURED_AFTER, "metrics": metrics, "objects": dict.fromkeys(names.values(), 3)}
    training = {**TRAINING, "steps": 9, "recipe": many, "evaluation": evaluation}
    provenance = {"converted_from": {"assumed": many, "file": "z" * 10**6}, "training": training}
    config = tiny_config(provenance=provenance)
    config.id2label = names
    text = model_card(config, 1, "n")
    assert len(text) < 400_000
    assert "and 600 more in `config.id2label`" in text
    assert "| and 600 more in config.provenance |" in text
    assert "and 950 more." in text
    assert "`key49=yyy" in text
    assert "`key50=" not in text


# ---------------------------------------------------------------------------------------------------------------------
# Folders


@pytest.mark.parametrize("model_class", [DinoDetrForObjectDetection, DinoDetrModel])
def test_saving_writes_the_card_and_saving_again_renews_it(model_class, tmp_path):
    model = model_class(tiny_config())
    model.save_pretrained(str(tmp_path / "birds"))
    text = (tmp_path / "birds/README.md").read_text()
    assert 'model="birds"' in text
    assert f"{model.num_parameters() / 1e6:.1f} M" in text
    model.config.provenance = {"training": TRAINING}
    model.add_model_tags("birds")
    model.save_pretrained(tmp_path / "birds")
    card = ModelCard.load(tmp_path / "birds/README.md")
    assert card.data.eval_results[0].metric_value == 0.4123
    assert card.data.tags == [*TAGS, "birds"]
    loaded = model_class.from_pretrained(tmp_path / "birds")
    assert loaded.config.provenance == {"training": TRAINING}


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: "# Mine\n",
        lambda text: "",
        lambda text: text.replace("object detector", "bird detector"),
        lambda text: text.replace("pipeline_tag:", "license: mit\npipeline_tag:"),
        lambda text: text + "\nAnd this.\n",
        lambda text: re.sub("<!--.*", "", text),
        lambda text: text.replace("---\nlibrary", "---\n: [\nlibrary"),
    ],
    ids=["other", "empty", "word", "metadata", "end", "no mark", "broken metadata"],
)
def test_a_card_that_somebody_wrote_or_edited_stays(edit, tmp_path):
    model = DinoDetrForObjectDetection(tiny_config())
    model.save_pretrained(tmp_path)
    file = tmp_path / "README.md"
    mine = edit(file.read_text())
    file.write_text(mine)
    model.config.provenance = {"training": TRAINING}
    model.save_pretrained(tmp_path)
    assert file.read_text() == mine


def test_line_ends_layout_and_tags_are_no_edits():
    text = model_card(tiny_config(provenance={"training": TRAINING}), 1, "birds")
    assert is_ours(text.replace("\n", "\r\n"))
    card = ModelCard(text)
    card.data.tags.append("birds")
    assert str(card) != text
    assert is_ours(str(card))


def test_only_the_main_process_writes(tmp_path):
    DinoDetrForObjectDetection(tiny_config()).save_pretrained(tmp_path, is_main_process=False)
    assert list(tmp_path.iterdir()) == []


def test_the_code_in_the_card_runs(tmp_path, monkeypatch):
    """With dino_hf, the block without it gives the same; without dino_hf, tests/hub runs the call."""
    DinoDetrForObjectDetection(tiny_config()).save_pretrained(tmp_path / "birds")
    DinoDetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 96}).save_pretrained(tmp_path / "birds")
    Image.new("RGB", (60, 40)).save(tmp_path / "street.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", Path("birds/README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block.replace("threshold=0.4", "threshold=0.0").replace("detector(", "found = detector(", 1), scope := {})
        assert len(scope["detector"]("street.jpg", threshold=0.0)) == 75


def test_a_card_of_a_folder_without_code_does_not_load_code(tmp_path, monkeypatch):
    config = tiny_config()
    assert "trust_remote_code" in model_card(config, 1, "birds", folder=tmp_path)
    assert "trust_remote_code" not in model_card(config, 1, "birds", folder=tmp_path / "checkpoint-30")
    monkeypatch.setattr(DinoDetrConfig, "saves_code", False)
    assert "trust_remote_code" not in model_card(config, 1, "birds")


def test_the_model_without_the_package_writes_no_card(tmp_path, monkeypatch):
    """Remotely loaded code has no hooks."""
    monkeypatch.setattr("dino_hf.model.modeling_dino_detr.saving_hooks", [])
    model = DinoDetrForObjectDetection(tiny_config(provenance={"training": TRAINING}))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert not (tmp_path / "README.md").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Weights that are no longer those of the record


def converted_model(**changes) -> DinoDetrForObjectDetection:
    """As convert_checkpoint.py leaves it."""
    model = DinoDetrForObjectDetection(tiny_config(**changes))
    model.config.provenance = {"converted_from": {**CONVERTED, "weights": weights_digest(model)}}
    return model


def words_of(folder: Path) -> str:
    return " ".join((folder / "README.md").read_text().split())


CHANGED = (
    "of the original release (https://github.com/IDEA-Research/DINO). "
    "The weights here were changed after the conversion, and no record says how."
)
NOT_THEIRS = (
    "**Published AP: 49.0**, reported by its authors and not measured by us. It belongs to that file and not to"
)


def with_other_bit(model):
    with torch.no_grad():
        bias = model.model.encoder.layers[0].mlp.fc2.bias
        bias.view(torch.int32)[-1] ^= 1


CHANGES = {
    "transfer": lambda model: transfer_classes(model, {0: "duck", 1: "goose"}),
    "one bit": with_other_bit,
    "half precision": lambda model: model.half(),
    "other random weights": lambda model: randomize(model),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_weights_have_no_published_ap(change, tmp_path, hub):
    model = converted_model()
    change(model)
    model.save_pretrained(tmp_path)
    model.push_to_hub("someone/birds")
    for text in (words_of(tmp_path), " ".join(hub.card.split())):
        assert CHANGED in text
        assert NOT_THEIRS in text


@pytest.mark.filterwarnings("ignore")  # the library names the tensors that it initialises
def test_loading_with_other_classes_changes_the_weights(tmp_path):
    converted_model().save_pretrained(tmp_path / "converted")
    names = {0: "duck", 1: "goose"}
    model = DinoDetrForObjectDetection.from_pretrained(
        tmp_path / "converted", id2label=names, ignore_mismatched_sizes=True
    )
    model.save_pretrained(tmp_path / "birds")
    assert CHANGED in words_of(tmp_path / "birds")
    assert NOT_THEIRS in words_of(tmp_path / "birds")


@pytest.mark.parametrize("backbone", [RESNET, SWIN, TIMM, BIT], ids=lambda backbone: backbone["model_type"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_weights_keep_their_published_ap(backbone, dtype, tmp_path, hub):
    model = DinoDetrForObjectDetection(tiny_config(backbone_config=dict(backbone))).to(dtype)
    model.config.provenance = {"converted_from": {**CONVERTED, "weights": weights_digest(model)}}
    model.save_pretrained(tmp_path / "first")
    for model_class in (DinoDetrForObjectDetection, DinoDetrModel):
        loaded = model_class.from_pretrained(tmp_path / "first")
        loaded.config.id2label = {index: f"bird {index}" for index in range(NUM_LABELS)}  # names are no weights
        loaded.to(memory_format=torch.channels_last)
        loaded.save_pretrained(tmp_path / "again")
        assert "not measured by us. The file" in words_of(tmp_path / "again")
        assert "changed after" not in words_of(tmp_path / "again")
    loaded.push_to_hub("someone/birds")
    assert "changed after" not in hub.card


def test_what_is_saved_counts_not_what_the_model_has(tmp_path):
    model = converted_model()
    model.save_pretrained(tmp_path, state_dict={name: value / 2 for name, value in model.state_dict().items()})
    assert CHANGED in words_of(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with_other_bit(model)
    model.save_pretrained(tmp_path, True, before)
    assert "changed after" not in words_of(tmp_path)


def test_folders_from_before_the_digest_keep_what_they_said(tmp_path):
    model = converted_model()
    del model.config.provenance["converted_from"]["weights"]
    with_other_bit(model)
    model.save_pretrained(tmp_path)
    assert "not measured by us. The file" in words_of(tmp_path)


@pytest.mark.parametrize(
    "provenance",
    [None, {"converted_from": CONVERTED}, {"training": TRAINING}, {"converted_from": {"weights": 3}}, "original"],
    ids=["none", "converted", "trained", "unreadable", "broken"],
)
def test_without_a_digest_to_compare_none_is_computed(provenance, tmp_path, monkeypatch):
    def fail(*_):
        raise AssertionError("computed")

    monkeypatch.setattr("dino_hf.runtime.model_card.weights_digest", fail)
    model = DinoDetrForObjectDetection(tiny_config())
    model.config.__dict__["provenance"] = provenance
    model.save_pretrained(tmp_path / "birds")
    model.config.provenance = {"converted_from": {**CONVERTED, "weights": "0123456789abcdef"}}
    model.save_pretrained(tmp_path / "none", is_main_process=False)
    with pytest.raises(AssertionError, match="computed"):
        model.save_pretrained(tmp_path / "birds")


def test_a_measured_ap_is_that_of_the_weights_with_its_digest():
    evaluation = {**TRAINING["evaluation"], "step": 100, "weights": "aaaa"}

    def card(steps: int, weights: str | None) -> tuple[int, str]:
        config = tiny_config(provenance={"training": {**TRAINING, "steps": steps, "evaluation": evaluation}})
        card = ModelCard(model_card(config, 1, "someone/birds", weights=weights))
        return len(card.data.eval_results or []), " ".join(card.text.split())

    for same in (card(100, "aaaa"), card(100, None), card(150, "aaaa")):
        assert same[0] == 3
        assert "changed since" not in same[1]
        assert "not measured with" not in same[1]
    results, text = card(100, "bbbb")
    assert results == 0
    assert "changed since then, and no record says how. AP was not measured with these weights." in text
    for weights in ("bbbb", None):
        results, text = card(150, weights)
        assert results == 0
        assert "these weights are from step 150. AP was not measured with these weights." in text


def test_a_digest_names_names_types_shapes_and_bits():
    model = DinoDetrForObjectDetection(tiny_config())
    state = {
        "model.a": torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]),
        "model.b": torch.tensor(-0.0),
        "c": torch.zeros(0),
    }
    others = [
        {**state, "model.d": torch.tensor(1)},
        {name: state[name] for name in ("model.a", "model.b")},
        {**state, "model.a": state["model.a"].T},
        {**state, "model.a": state["model.a"].view(torch.int32)},
        {**state, "model.b": torch.tensor(0.0)},
        {"model.x": state["model.a"], "model.b": state["model.b"], "c": state["c"]},
    ]
    digests = {weights_digest(model, one) for one in (state, *others)}
    assert len(digests) == 1 + len(others)
    assert None not in digests
    digest = weights_digest(model, state)
    assert re.fullmatch("[0-9a-f]{16}", digest)
    assert weights_digest(model, dict(reversed(state.items()))) == digest
    assert weights_digest(model, {**state, "model.a": state["model.a"].T.contiguous().T}) == digest
    assert weights_digest(model, {name.removeprefix("model."): value for name, value in state.items()}) == digest


class Part(torch.Tensor):
    """As DTensor: what one process has of a tensor."""


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, device="meta"),
        torch.eye(2).to_sparse(),
        torch.zeros(2).as_subclass(Part),
        {"no": "tensor"},
    ],
    ids=["offloaded", "sparse", "sharded", "other"],
)
def test_weights_that_are_not_here_as_they_are_have_no_digest(tensor):
    assert weights_digest(DinoDetrForObjectDetection(tiny_config()), {"a": torch.zeros(2), "b": tensor}) is None


def test_models_whose_weights_are_elsewhere_have_no_digest(tmp_path):
    model = converted_model()
    assert weights_digest(model, {}) is None
    model.model.backbone.test = type("FullyShardedDataParallel", (torch.nn.Module,), {})()
    assert weights_digest(model) is None
    assert weights_digest(model, converted_model().state_dict()) is not None
    with torch.device("meta"):
        assert weights_digest(DinoDetrForObjectDetection(tiny_config())) is None
    model = converted_model()
    next(model.parameters()).ds_id = 0
    with_other_bit(model)
    model.save_pretrained(tmp_path)
    assert "changed after" not in words_of(tmp_path)  # nobody knows


# ---------------------------------------------------------------------------------------------------------------------
# The Hub


class Hub:
    """Takes the place of the calls that reach the Hub."""

    def __init__(self, folder: Path):
        self.folder, self.uploaded, self.calls = folder, {}, []

    @property
    def card(self) -> str | None:
        return self.uploaded.get("README.md")

    def create_repo(self, api, repo_id, **kwargs):
        self.calls.append(("create_repo", repo_id))
        return type("Url", (), {"repo_id": repo_id})

    def create_commit(self, api, repo_id, operations, **kwargs):
        self.calls.append(("create_commit", repo_id))
        for one in operations:
            self.uploaded[one.path_in_repo] = Path(one.path_or_fileobj).read_bytes().decode("utf-8", "replace")

    def download(self, repo_id, filename, **kwargs):
        if filename not in self.uploaded:
            raise EntryNotFoundError("nothing there")
        self.folder.mkdir(exist_ok=True)
        (self.folder / filename).write_text(self.uploaded[filename])
        return str(self.folder / filename)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    hub = Hub(tmp_path / "downloaded")
    for name in ("create_repo", "create_commit"):
        method = getattr(hub, name)
        monkeypatch.setattr(HfApi, name, lambda api, *args, method=method, **kwargs: method(api, *args, **kwargs))
    monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", hub.download)
    return hub


def trained() -> DinoDetrForObjectDetection:
    return DinoDetrForObjectDetection(tiny_config(provenance={"training": TRAINING}))


def test_pushing_uploads_our_card(hub):
    trained().push_to_hub("someone/birds", tags=["birds"])
    assert is_ours(hub.card)
    assert 'model="someone/birds"' in hub.card
    card = ModelCard(hub.card)
    assert card.data.tags == [*TAGS, "birds"]
    assert card.data.eval_results[0].metric_value == 0.4123
    assert {"config.json", "model.safetensors", "modeling_dino_detr.py"} <= set(hub.uploaded)


def test_pushing_again_renews_our_card_and_keeps_its_tags(hub):
    DinoDetrForObjectDetection(tiny_config()).push_to_hub("someone/birds", tags="birds")
    assert "may be random" in hub.card
    trained().push_to_hub("someone/birds", tags=["ducks"])
    assert "may be random" not in hub.card
    assert is_ours(hub.card)
    assert ModelCard(hub.card).data.tags == [*TAGS, "birds", "ducks"]


@pytest.mark.parametrize("text", ["# Mine\n", "---\nlicense: mit\ntags:\n- x\n---\n\n# Mine\n"])
def test_a_card_that_is_in_the_repository_gets_tags_only(text, hub):
    hub.uploaded["README.md"] = text
    trained().push_to_hub("someone/birds")
    before, after = ModelCard(text), ModelCard(hub.card)
    assert after.text.strip() == "# Mine"
    assert after.data.to_dict() == before.data.to_dict()
    trained().push_to_hub("someone/birds", tags=["birds"])
    after = ModelCard(hub.card)
    assert after.text.strip() == "# Mine"
    assert after.data.tags == [*(before.data.tags or []), "birds"]
    assert after.data.license == before.data.license


def test_an_edited_card_of_ours_stays_in_the_repository(hub):
    trained().push_to_hub("someone/birds")
    hub.uploaded["README.md"] = hub.card.replace("object detector", "bird detector")
    trained().push_to_hub("someone/birds")
    assert "# DINO bird detector" in hub.card
    assert not is_ours(hub.card)


@pytest.mark.parametrize("order", ["model first", "model last"])
def test_processor_and_configuration_leave_the_card_to_the_model(order, hub):
    model, parts = trained(), [DinoDetrImageProcessor(), DinoDetrConfig()]
    for thing in [model, *parts] if order == "model first" else [*parts, model]:
        thing.push_to_hub("someone/birds")
    assert is_ours(hub.card)
    assert {"preprocessor_config.json", "image_processing_pil_dino_detr.py", "modeling_dino_detr.py"} <= set(
        hub.uploaded
    )


def test_saving_with_upload_writes_and_uploads_the_card(hub, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path / "birds", push_to_hub=True, repo_id="someone/birds")
    assert is_ours(hub.card)
    assert (tmp_path / "birds/README.md").read_text() == hub.card
    assert "modeling_dino_detr.py" in hub.uploaded
    (tmp_path / "birds/README.md").write_text("# Mine\n")
    model.save_pretrained(tmp_path / "birds", push_to_hub=True, repo_id="someone/birds")
    assert (tmp_path / "birds/README.md").read_text() == hub.card == "# Mine\n"


@pytest.mark.parametrize("thing", [DinoDetrImageProcessor(), tiny_config()], ids=["processor", "configuration"])
@pytest.mark.parametrize("used", [False, True], ids=["new", "used"])
def test_saving_a_part_with_upload_uploads_its_code(thing, used, hub, tmp_path):
    folder = tmp_path / "birds"
    if used:
        thing.save_pretrained(folder)
        (folder / "README.md").write_text("# Mine\n")
    thing.save_pretrained(str(folder), push_to_hub=True, repo_id="someone/birds")
    assert "modeling_dino_detr.py" in hub.uploaded
    assert hub.card is None
    assert (folder / "README.md").exists() == used


def test_without_a_connection_no_card_is_taken_for_missing(hub, monkeypatch):
    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr("huggingface_hub.repocard.hf_hub_download", fail)
    for thing in (trained(), DinoDetrImageProcessor()):
        with pytest.raises(LocalEntryNotFoundError):
            thing.push_to_hub("someone/birds")
    assert hub.uploaded == {}
