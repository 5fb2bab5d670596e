"""Tiles and test-time augmentation on detectors whose answers are known: each object comes once, in its place."""

import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from dino_hf.common.tiles import Tile, split
from dino_hf.inference.augmented import augmented_detectors, detect_augmented, fuse, share
from dino_hf.inference.boxes import overlap
from dino_hf.inference.predict import predict
from dino_hf.inference.predictor import Detections, Predictor
from dino_hf.inference.tiling import choose_tiling, detect_tiled, merge, trained_tiling
from dino_hf.model.package_warning import DinoDetrWarning
from inference_toys import noise, toy_detector

WIDTH, HEIGHT = 1500, 1100


def numbered_canvas() -> Image.Image:
    """Each pixel's colour is its number, by which a crop knows where it comes from."""
    numbers = np.arange(WIDTH * HEIGHT).reshape(HEIGHT, WIDTH)
    return Image.fromarray(np.stack([numbers >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8))


def knowing_detector(objects: list[tuple], seed: int = 0, sees_in_whole=lambda box: True, least_part: float = 0.1):
    """Finds of each object (class, x0, y0, x1, y1) the part that an image shows, to 2 pixels or a twentieth of its size."""
    rng = np.random.default_rng(seed)

    def detect(images):
        for image in images:
            colour = np.asarray(image)[0, 0].astype(int)
            y, x = divmod(colour @ (1, 256, 65536), WIDTH)
            low, high = np.array([x, y, x, y]), np.array([x + image.width, y + image.height] * 2)
            boxes, scores, labels = [], [], []
            for label, *box in objects:
                visible = np.clip(box, low, high)
                sides = visible[2:] - visible[:2]
                is_seen = sides.prod() > least_part * np.prod(np.subtract(box[2:], box[:2])) and sides.min() > 4
                if is_seen and (image.size != (WIDTH, HEIGHT) or sees_in_whole(box)):
                    noise = rng.uniform(-2, 2, 4) * np.minimum(1, sides[[0, 1, 0, 1]] / 40)
                    boxes.append(visible + noise - low)
                    scores.append(rng.uniform(0.55, 0.95))
                    labels.append(label)
            yield Detections.sorted(boxes, scores, labels)

    return detect


def scattered(seed: int, num_objects: int = 60) -> list[tuple]:
    """12 to 900 pixels large, in corners, on borders and anywhere; those of one class cover little of each other."""
    rng, objects = np.random.default_rng(seed), [(0, 0, 0, 30, 40), (1, WIDTH - 50, HEIGHT - 25, WIDTH, HEIGHT)]
    while len(objects) < num_objects:
        width = np.exp(rng.uniform(np.log(12), np.log(900)))
        height = width * rng.uniform(0.5, 2)
        if width < WIDTH and height < HEIGHT:
            x, y = rng.uniform(0, WIDTH - width), rng.uniform(0, HEIGHT - height)
            label, box = int(rng.integers(3)), np.array([x, y, x + width, y + height])
            others = np.array([other[1:] for other in objects if other[0] == label]).reshape(-1, 4)
            if not (overlap(box, others, over_smaller=True) > 0.3).any():
                objects.append((label, *box))
    return objects


def assert_each_once(found: Detections, objects: list[tuple], least_overlap: float = 0.5) -> None:
    boxes, labels = np.array([one[1:] for one in objects]), np.array([one[0] for one in objects])
    hits = [
        int(np.argmax(overlap(box, boxes) * (labels == label)))
        for box, label in zip(found.boxes, found.labels, strict=True)
    ]
    assert sorted(hits) == list(range(len(objects)))
    for box, hit in zip(found.boxes, hits, strict=True):
        assert overlap(box, boxes[hit][None])[0] > least_overlap


@pytest.mark.parametrize("whole", ["all", "large", "none below 60"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_each_object_comes_once(seed, whole):
    objects = scattered(seed)
    large = {"all": 0, "large": 150, "none below 60": 60}[whole]
    detector = knowing_detector(objects, seed, lambda box: max(box[2] - box[0], box[3] - box[1]) >= large)
    found = list(detect_tiled(detector, (480, 400), 0.35 if whole == "large" else 0.2)([numbered_canvas()] * 2))
    assert len(found) == 2
    for one in found:
        assert_each_once(one, objects)
        assert (np.diff(one.scores) <= 0).all()


def test_without_merging_they_would_come_often():
    objects = scattered(1)
    answers = list(knowing_detector(objects)(numbered_canvas().crop(tile) for tile in tiles_of_canvas()))
    assert sum(len(answer.scores) for answer in answers) > 2 * len(objects)


def tiles_of_canvas() -> list[Tile]:
    return split((WIDTH, HEIGHT), (480, 400), 0.2)


def test_what_no_tile_shows_whole_is_put_together_from_its_pieces():
    long = [(0, 100, 90, 1400, 150), (1, 700, 20, 760, 1000), (0, 300, 600, 900, 980)]
    small = [(0, 50, 300, 80, 340), (1, 1000, 500, 1040, 540)]
    detector = knowing_detector(long + small, 4, lambda box: False)
    found = next(detect_tiled(detector, (480, 400), 0.2)([numbered_canvas()]))
    assert_each_once(found, long + small, 0.85)  # pieces are wrong by 2 pixels of 60, on both sides


def test_a_piece_at_a_border_is_dropped_for_the_whole_object_whatever_their_scores():
    tiles = [Tile(0, 0, 200, 100), Tile(0, 0, 120, 100), Tile(80, 0, 200, 100)]
    nothing = Detections.sorted([], [], [])
    cut = Detections.sorted([[100, 20, 119, 60]], [0.9], [0])  # to x = 119, where the first tile ends
    whole = Detections.sorted([[22, 20, 48, 60]], [0.6], [0])  # in the second: 102 to 128
    merged = merge([nothing, cut, whole], tiles, (40, 40))
    np.testing.assert_allclose(merged.boxes, [[102, 20, 128, 60]])
    np.testing.assert_allclose(merged.scores, [0.6])
    other_class = whole._replace(labels=np.array([1]))
    assert len(merge([nothing, cut, other_class], tiles, (40, 40)).scores) == 2


def test_a_small_object_on_the_whole_image_gives_way_to_what_a_tile_shows():
    tiles = [Tile(0, 0, 200, 100), Tile(0, 0, 120, 100), Tile(80, 0, 200, 100)]
    coarse = Detections.sorted([[30, 30, 52, 56], [150, 30, 170, 50]], [0.95, 0.7], [2, 2])
    sharp = Detections.sorted([[35, 34, 49, 50]], [0.8], [2])
    nothing = Detections.sorted([], [], [])
    merged = merge([coarse, sharp, nothing], tiles, (40, 40))
    np.testing.assert_allclose(merged.boxes, [[35, 34, 49, 50], [150, 30, 170, 50]])  # what no tile shows stays


def test_an_image_of_one_tile_is_left_to_the_detector():
    calls = []

    def detect(images):
        for image in images:
            calls.append(image.size)
            yield Detections.sorted([[1, 2, 3, 4]], [0.5], [0])

    images = [Image.new("RGB", size) for size in [(640, 480), (641, 480), (30, 40)]]
    assert len(list(detect_tiled(detect, (640, 480))(images))) == 3
    assert calls == [(640, 480), (641, 480), (640, 480), (640, 480), (30, 40)]


def test_a_real_predictor_sees_tiles_where_they_are():
    predictor = Predictor(*toy_detector())
    image = noise(150, 90)
    found = next(detect_tiled(lambda images: predictor(images, batch_size=4, threshold=0.03), (100, 90), 0.2)([image]))
    assert len(found.scores) > 0
    assert (found.boxes > -5).all()
    assert (found.boxes < (155, 95, 155, 95)).all()


# -- test-time augmentation


def test_views_are_fused_by_their_scores_with_one_vote_each():
    first = Detections.sorted([[10, 10, 50, 50], [100, 10, 140, 50]], [0.9, 0.6], [0, 1])
    second = Detections.sorted([[14, 10, 54, 50], [100, 10, 140, 50]], [0.3, 0.6], [0, 2])
    fused = fuse([first, second])
    np.testing.assert_allclose(fused.boxes[0], [11, 10, 51, 50])  # (0.9 * 10 + 0.3 * 14) / 1.2
    np.testing.assert_allclose(fused.scores, [0.6, 0.3, 0.3])  # another class is another object
    assert fused.labels.tolist() == [0, 1, 2]


def test_two_objects_of_one_view_stay_two():
    twins = Detections.sorted([[10, 10, 50, 50], [14, 10, 54, 50]], [0.9, 0.8], [0, 0])
    fused = fuse([twins, twins])
    np.testing.assert_allclose(fused.boxes, twins.boxes)
    np.testing.assert_allclose(fused.scores, twins.scores)
    nothing = Detections.sorted([], [], [])
    assert fuse([nothing, nothing]).boxes.shape == (0, 4)
    np.testing.assert_allclose(fuse([twins, nothing]).scores, twins.scores / 2)


def bright_spot(images):
    """Finds the bright rectangle of a dark image; surer, the more of its left half is bright."""
    for image in images:
        bright = np.asarray(image.convert("L")) > 128
        rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
        box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        yield Detections.sorted([box], [0.8 if columns[0] < image.width / 2 else 0.4], [0])


def test_mirrored_answers_are_turned_back():
    images = []
    for x in (20, 150):
        pixels = np.zeros((60, 200, 3), dtype=np.uint8)
        pixels[10:40, x : x + 30] = 255
        images.append(Image.fromarray(pixels))
    found = list(detect_augmented([bright_spot, bright_spot])(images))
    assert [one.boxes.tolist() for one in found] == [[[20, 10, 50, 40]], [[150, 10, 180, 40]]]
    np.testing.assert_allclose([one.scores[0] for one in found], 0.6)
    assert [len(one.scores) for one in detect_augmented([bright_spot], threshold=0.61)(images)] == [0, 0]


def test_all_views_of_a_real_predictor_have_a_say():
    predictor = Predictor(*toy_detector())
    images = [noise(90, 60), noise(60, 90), noise(90, 60, 1)]
    detectors = augmented_detectors(predictor, batch_size=2, threshold=0.01)
    assert len(detectors) == 3
    found = list(detect_augmented(detectors, 0.01)(images))
    for image, one in zip(images, found, strict=True):
        alone = next(detect_augmented(detectors, 0.01)([image]))
        np.testing.assert_allclose(one.boxes, alone.boxes, atol=0.01)  # float32 in batches of other sizes
        assert one.scores.min() > 0.01


# The borders of what decides

TWO_TILES = [Tile(0, 0, 1000, 600), Tile(0, 0, 600, 600), Tile(400, 0, 1000, 600)]


def merged(whole=(), left=(), right=(), tiles=TWO_TILES) -> Detections:
    """Of one class, on the whole image and on the two tiles, in pixels of the image; the scores fall in this order."""
    score, answers = 0.9, []
    for boxes, tile in zip((whole, left, right), tiles, strict=True):
        scores = [score := score - 0.01 for _ in boxes]
        inside = [np.subtract(box, (tile.x0, tile.y0) * 2) for box in boxes]
        answers.append(Detections.sorted(inside, scores, [0] * len(scores)))
    return merge(answers, tiles, (120, 120))


@pytest.mark.parametrize(("shift", "count"), [(66, 1), (67, 2)])  # of 200 pixels: IoU 0.504 and 0.498
def test_trusted_boxes_are_one_object_above_an_iou_of_a_half(shift, count):
    found = merged(whole=[(100, 100, 300, 300), (100 + shift, 100, 300 + shift, 300)])
    assert len(found.scores) == count


@pytest.mark.parametrize(("shift", "count"), [(49, 1), (50, 2)])  # of 100 pixels: 0.51 and 0.5 of it are covered
def test_a_distrusted_box_goes_where_more_than_half_is_covered(shift, count):
    found = merged(whole=[(700 + shift, 200, 800 + shift, 300)], right=[(700, 200, 800, 300)])
    assert len(found.scores) == count


@pytest.mark.parametrize(("shift", "count"), [(66, 1), (67, 2)])
def test_pieces_are_of_one_object_above_an_iou_of_a_half_in_what_both_tiles_show(shift, count):
    found = merged(left=[(350, 100, 600, 300)], right=[(400, 100 + shift, 700, 300 + shift)])
    assert len(found.scores) == count


@pytest.mark.parametrize(
    ("side", "margin"), [(600, 6.0), (150, 2.0)]
)  # a hundredth of the side, and at least two pixels
def test_a_box_is_cut_off_within_a_hundredth_of_the_side(side, margin):
    tiles = [Tile(0, 0, 3 * side // 2, side), Tile(0, 0, side, side), Tile(side // 2, 0, 3 * side // 2, side)]
    around = (side - 145, 10, side + 50, side - 10)  # trusted, for it does not fit into the overlap
    for from_border, count in ((margin, 1), (margin + 0.05, 2)):
        inner = (side - 60, 20, side - from_border, 60)
        assert len(merged(whole=[around], left=[inner], tiles=tiles).scores) == count


@pytest.mark.parametrize(("shift", "count"), [(29.0, 1), (29.1, 2)])  # of 100 pixels: IoU 0.5504 and 0.5492
def test_boxes_of_two_views_are_fused_above_an_iou_of_0_55(shift, count):
    views = [Detections.sorted([(0 + x, 0, 100 + x, 40)], [0.8], [1]) for x in (0, shift)]
    assert len(fuse(views).scores) == count


def test_views_have_three_sizes_and_count_from_a_sixth_of_the_threshold():
    predictor = SimpleNamespace(can_scale=True)
    predictor.at_scale = lambda scale, num_more: lambda images, **settings: (scale, num_more, settings["threshold"])
    views = [detect([]) for detect in augmented_detectors(predictor, 2, threshold=0.6)]
    assert views == [(scale, 5, pytest.approx(0.1)) for scale in (1.0, 0.8, 1.25)]


def test_shared_items_are_let_go_when_all_have_them():
    class Item:
        pass

    made = []

    def make(_) -> Item:
        item = Item()
        made.append(weakref.ref(item))
        return item

    first, second = share(map(make, range(9)), 2)
    for number in range(4):
        assert next(first) is not None
        assert sum(one() is not None for one in made) == number + 1
    for number in range(4):
        assert next(second) is not None
        assert sum(one() is not None for one in made) == 3 - number
    assert len(list(first)) == 5
    assert len(list(second)) == 5
    assert [list(one) for one in share([3, 1, 2], 3)] == [[3, 1, 2]] * 3


def test_an_iou_of_exactly_the_limit_is_not_above_it():
    assert len(merged(whole=[(100, 100, 300, 250), (100, 150, 300, 300)]).scores) == 2
    assert len(merged(left=[(350, 100, 600, 250)], right=[(400, 150, 700, 300)]).scores) == 2
    views = [Detections.sorted([(0, y, 100, 31 + y)], [0.8], [1]) for y in (0, 9)]  # 22 of 40: 0.55
    assert len(fuse(views).scores) == 2


@pytest.mark.parametrize("beyond", [(-9, 20, 60, 60), (20, -9, 60, 60)])
def test_a_box_that_sticks_out_of_its_tile_by_far_is_cut_off_too(beyond):
    """Of the tile in the lower right corner, whose borders at the left and at the top are inside the image."""
    tiles = [Tile(0, 0, 900, 900), Tile(0, 0, 600, 600), Tile(300, 300, 900, 900)]
    box = np.add(beyond, 300)
    none = Detections.sorted(np.zeros((0, 4)), [], [])
    around = [min(box[0], 290), min(box[1], 290), 500, 500]
    whole = Detections.sorted([around], [0.9], [0])
    inner = Detections.sorted([beyond], [0.95], [0])
    assert len(merge([whole, none, inner], tiles, (120, 120)).scores) == 1


# Low scores, which evaluation keeps


def test_a_low_score_neither_drops_nor_stretches_a_confident_piece():
    def found(second: float) -> Detections:
        left = Detections.sorted([(350, 100, 600, 300)], [0.9], [0])
        right = Detections.sorted([(0, 100, 350, 300)], [second], [0])
        return merge([Detections.sorted([], [], []), left, right], TWO_TILES, (120, 120))

    np.testing.assert_allclose(found(0.45).boxes, [[350, 100, 750, 300]])
    np.testing.assert_allclose(found(0.44).boxes, [[350, 100, 600, 300]])  # the worse piece is dropped
    whole = Detections.sorted([(340, 90, 760, 310)], [0.44], [0])
    left = Detections.sorted([(350, 100, 600, 300)], [0.9], [0])
    both = merge([whole, left, Detections.sorted([], [], [])], TWO_TILES, (120, 120))
    assert both.scores.tolist() == [0.9, 0.44]


def test_evaluation_merges_the_best_detections_of_all_tiles():
    rng = np.random.default_rng(0)

    def many(scores) -> Detections:
        low = rng.uniform(20, 500, (len(scores), 2))
        return Detections.sorted(np.concatenate([low, low + 15], axis=1), scores, rng.integers(0, 3, len(scores)))

    answers = [many(rng.uniform(0, 1, 50)) for _ in TWO_TILES]
    everything = merge(answers, TWO_TILES, (120, 120))
    limited = merge(answers, TWO_TILES, (120, 120), max_detections=7)
    assert len(everything.scores) > 7
    for one, other in zip(limited[:3], everything[:3], strict=True):
        np.testing.assert_array_equal(one, other[:7])
    best = np.sort(np.concatenate([answer.scores for answer in answers]))[::-1][: 4 * 7]
    sliced = [answer.keep(answer.scores >= best[-1]) for answer in answers]
    np.testing.assert_array_equal(limited.scores, merge(sliced, TWO_TILES, (120, 120)).scores[:7])


@pytest.mark.parametrize(
    ("record", "tiling"),
    [
        ({"training": {"tiles": {"size": [64, 48], "overlap": 0.3}}}, ((64, 48), 0.3)),
        ({"training": {"tiles": {"size": [64, 0], "overlap": 0.3}}}, None),
        ({"training": {"tiles": {"size": "64", "overlap": [0.3]}}}, None),
        ({"training": {"tiles": {"size": [math.inf, 48], "overlap": 0.3}}}, None),
        ({"training": {"tiles": {"size": [64, 48], "overlap": 10**400}}}, None),
        ({"training": {"tiles": {"size": [64, 48]}}}, None),
        ({"training": {"tiles": None}}, None),
        ({"training": []}, None),
        (None, None),
    ],
)
def test_tiles_of_the_training_are_read_from_an_untrusted_record(record, tiling):
    model = SimpleNamespace(config=SimpleNamespace(provenance=record))
    assert trained_tiling(model) == tiling
    assert choose_tiling(None, None, model) == tiling
    assert choose_tiling("none", None, model) is None
    assert choose_tiling("96x80", 0.1, model) == ((96, 80), 0.1)
    assert choose_tiling(None, None) is None


def test_predict_uses_the_tiles_of_the_training_and_says_so():
    model, processor = toy_detector()
    model.config.provenance = {"training": {"tiles": {"size": [100, 90], "overlap": 0.2}}}
    predictor, image = Predictor(model, processor), noise(150, 90)
    with pytest.warns(DinoDetrWarning, match=r"100 x 90 pixels.*--tiles none"):
        found = predict(predictor, image, threshold=0.03)[0]
    chosen = predict(predictor, image, threshold=0.03, tiles=(100, 90))[0]
    whole = predict(predictor, image, threshold=0.03, tiles="none")[0]
    np.testing.assert_array_equal(found.boxes, chosen.boxes)
    assert found.boxes.shape != whole.boxes.shape
    assert len(predict(predictor, image, threshold=0.03, all_scores=True)[0].queries)  # of the whole image
