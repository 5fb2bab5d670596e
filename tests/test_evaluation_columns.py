"""Detections as tables: each image is asked for everything once, and an error names its image."""

import pytest

from dino_hf.evaluation.classes import map_classes
from dino_hf.evaluation.columns import detection_columns, image_name
from evaluation_toys import ReadyPredictor, draw_blocks, noisy_answers


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return draw_blocks(tmp_path_factory.mktemp("data") / "blocks", ["disc", "box"], 6)


class Recording(ReadyPredictor):
    """Remembers its settings. After `num_answers` images it fails once, as a device does that lacks memory for a moment."""

    def __init__(self, data, num_answers=None):
        super().__init__(data.id2label, noisy_answers(data))
        self.settings, self.num_answers, self.asked = [], num_answers, []

    def __call__(self, images, *, batch_size, threshold, max_detections=None):
        self.settings.append((batch_size, threshold, max_detections))
        if len(self.settings) > 1:
            images = list(images)
            self.asked += [image.tobytes() for image in images]
            yield from super().__call__(images)
            return
        for number, found in enumerate(super().__call__(images)):
            if number == self.num_answers:
                raise RuntimeError("out of memory")
            yield found


def columns_of(predictor, data, **settings):
    classes = map_classes(predictor.id2label, None, data, "toy")
    return detection_columns(predictor, data, classes, 3, lambda *step: None, **settings)


def test_an_evaluation_wants_detections_of_every_score(data):
    predictor = Recording(data)
    columns_of(predictor, data, max_detections=150)
    assert predictor.settings == [(3, 0.0, 150)]


def test_only_the_images_without_an_answer_are_asked_again(data):
    predictor = Recording(data, num_answers=3)
    with pytest.raises(RuntimeError, match="out of memory") as raised:
        columns_of(predictor, data)
    assert raised.value.__notes__ == [
        "The error came between 0004.png and 0004.png. A smaller batch size needs less memory."
    ]
    assert predictor.settings == [(3, 0.0, None), (1, 0.0, None)]
    assert predictor.asked == [data.dataset[3]["image"].tobytes()]


def test_the_table_has_a_row_for_each_detection_in_the_order_of_the_images(data):
    predictor = Recording(data)
    found, left_out = columns_of(predictor, data)
    counts = [len(predictor.answers[row["image"].tobytes()][1]) for row in data.dataset]
    assert found["image_id"].tolist() == [
        n for n, count in zip(data.dataset["image_id"], counts, strict=True) for _ in range(count)
    ]
    assert found["boxes"].shape == (sum(counts), 4)
    assert left_out == {}


def test_an_image_without_a_file_is_named_by_its_id(data):
    assert image_name(data, 1) == "0002.png"
    without_files = data._replace(dataset=data.dataset.remove_columns("file_name"))
    assert image_name(without_files, 1) == "image 2"
