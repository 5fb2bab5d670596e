"""Compare one score threshold for all classes with a threshold for each class, chosen on few images and tested on others.

    python benchmarks/class_thresholds.py my-detector my-data --choose validation --test test

Thresholds are chosen on random parts of the first split. F1 (IoU 0.5) is measured on the second split. By a rule of N objects, a
class has its own threshold if the part has at least N objects of the class; other classes use the threshold for all classes.
"""

import argparse
from pathlib import Path

import numpy as np

from dino_hf.data import load_data
from dino_hf.evaluation import evaluate
from dino_hf.evaluation.coco import evaluate_class, of_class
from dino_hf.evaluation.curves import best_threshold
from dino_hf.evaluation.matching import class_matches

RULES = {"one for all": None, "each class": 1, "from 10 objects": 10, "from 25": 25, "from 50": 50, "from 100": 100}


class Ranking:
    """The detections of one class, highest score first, and its objects."""

    def __init__(self, matches):
        is_true, counts = matches.is_true()
        self.scores, self.is_true, self.images = matches.scores[counts], is_true[counts], matches.images[counts]
        self.objects = matches.objects[0]  # index of the image of each object

    def of_images(self, is_chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Scores, whether each detection is true, and the number of objects, in the chosen images (I,) bool."""
        keep = is_chosen[self.images]
        return self.scores[keep], self.is_true[keep], int(is_chosen[self.objects].sum())

    def counts(self, threshold: float) -> np.ndarray:
        """True positives, detections and objects at a threshold."""
        keep = self.scores > threshold
        return np.array([self.is_true[keep].sum(), keep.sum(), len(self.objects)])


def rankings(model: Path, data) -> tuple[list[Ranking], int]:
    found = evaluate(model, data, num_bootstrap=0, device="cpu")
    ids = found.image_ids
    parts = ((of_class(found.truth, index), of_class(found.found, index)) for index in found.class_names)
    return [Ranking(class_matches(evaluate_class(*part), ids)) for part in parts], len(ids)


def f1(counts: np.ndarray) -> float:
    return 2 * counts[0] / max(counts[1] + counts[2], 1)


def one_draw(chosen: list[Ranking], tested: list[Ranking], is_chosen: np.ndarray) -> dict[str, tuple[float, float]]:
    """F1 of all classes together, and its mean over classes, in the test images by each rule."""
    parts = [ranking.of_images(is_chosen) for ranking in chosen]
    scores, is_true = (np.concatenate([part[place] for part in parts]) for place in (0, 1))
    order = np.argsort(-scores, kind="stable")
    together = best_threshold(scores[order], is_true[order], sum(part[2] for part in parts))
    default = 0.5 if together is None else together.threshold
    results = {}
    for name, least in {**RULES, "0.5": None}.items():
        counts = []
        for part, ranking in zip(parts, tested, strict=True):
            own = best_threshold(*part) if least is not None and part[2] >= least else None
            threshold = 0.5 if name == "0.5" else default if own is None else own.threshold
            counts.append(ranking.counts(threshold))
        results[name] = f1(sum(counts)), float(np.mean([f1(count) for count in counts]))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--choose", default="validation", help="Split that thresholds are chosen on.")
    parser.add_argument("--test", default="test", help="Split that F1 is measured on.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 20, 50, 100, 200, 400])
    parser.add_argument("--draws", type=int, default=200, help="Random parts of each size.")
    given = parser.parse_args()
    data = load_data(given.data)
    chosen, num_images = rankings(given.model, getattr(data, given.choose))
    tested, _ = rankings(given.model, getattr(data, given.test))
    rng = np.random.default_rng(0)
    print("| images | objects of a class |" + "".join(f" {name} |" for name in [*RULES, "0.5"]))
    print("| --- " * (len(RULES) + 3) + "|")
    for size in given.sizes:
        draws, objects = [], []
        for _ in range(given.draws if size < num_images else 1):
            is_chosen = np.zeros(num_images, dtype=bool)
            is_chosen[rng.permutation(num_images)[:size]] = True
            draws.append(one_draw(chosen, tested, is_chosen))
            objects.append(np.mean([is_chosen[ranking.objects].sum() for ranking in chosen]))
        cells = [np.mean([draw[name] for draw in draws], axis=0) * 100 for name in [*RULES, "0.5"]]
        print(f"| {size} | {np.mean(objects):.0f} |" + "".join(f" {all_:.1f} / {mean:.1f} |" for all_, mean in cells))


if __name__ == "__main__":
    main()
