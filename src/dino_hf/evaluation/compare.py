"""Compare two detectors on the same images and on the same resamples of them (paired bootstrap)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from .bootstrap import STATISTICS, centre, interval, mean_over_classes
from .result import Evaluation


@dataclass(frozen=True)
class Difference:
    """The difference of one number, B minus A, in [-1, 1]."""

    name: str  # AP, AP50, ..., AP_class_<name>
    a: float  # in [0, 1]
    b: float
    interval: tuple[float, float]  # 95 %
    share_better: float  # share of the resamples in which B is higher

    @property
    def difference(self) -> float:
        return self.b - self.a

    @property
    def is_shown(self) -> bool:
        """Whether the interval excludes zero."""
        low, high = self.interval
        return low > 0 or high < 0


@dataclass(frozen=True, repr=False)
class Comparison:
    """Differences between two detectors, for all numbers with intervals (objects in at least two images).

    Each interval is for a single number. Among 80 classes, 4 intervals are expected to exclude zero even for equal detectors.
    """

    model_a: str
    model_b: str
    data_name: str | None
    num_resamples: int
    differences: list[Difference]  # AP, AP50, AP75, AP by size, AP of each class

    def __repr__(self) -> str:
        return f"Comparison({self.verdict}, {len(self.differences)} differences)"

    @property
    def verdict(self) -> str:
        """One sentence about the difference of AP, in [0, 1]."""
        overall = self.differences[0]
        low, high = overall.interval
        numbers = f"{overall.difference:+.3f} AP [{low:.3f}, {high:.3f}]"
        if not overall.is_shown:
            return f"No difference can be shown: {numbers}"
        return f"B is better: {numbers}" if low > 0 else f"A is better: B has {numbers}"

    def as_dict(self) -> dict[str, Any]:
        """All differences for json."""
        return {
            "model_a": self.model_a,
            "model_b": self.model_b,
            "dataset": self.data_name,
            "resamples": self.num_resamples,
            "verdict": self.verdict,
            "differences": [
                {
                    "name": entry.name,
                    "a": entry.a,
                    "b": entry.b,
                    "difference": entry.difference,
                    "interval_95": list(entry.interval),
                    "share_b_better": entry.share_better,
                }
                for entry in self.differences
            ],
        }


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """Compare two evaluations of the same data.

    Raises:
        ValueError: the two have different images or resamples, or fewer than two images have objects.
    """
    _check_alike(a, b)
    pairs = [
        (name, mean_over_classes(a.samples)[:, i], mean_over_classes(b.samples)[:, i])
        for i, name in enumerate(STATISTICS)
    ]
    pairs += [
        (f"AP_class_{name}", a.samples[:, index, 0], b.samples[:, index, 0])
        for index, name in enumerate(a.class_names.values())
    ]
    differences = []
    for name, of_a, of_b in pairs:
        if name not in a.intervals:
            continue
        score_a, score_b = a.metrics[name], b.metrics[name]
        bounds = interval(of_b - of_a, score_b - score_a, lowest=-1.0)
        share = (centre(of_b - of_a, score_b - score_a) > 0).mean()
        differences.append(Difference(name, score_a, score_b, bounds, float(share)))
    if not differences:
        raise ValueError(
            f"{a.data_name or 'The data'}: only one image or none has annotated objects; a comparison needs at least two."
        )
    return Comparison(a.model, b.model, a.data_name, len(a.samples), differences)


def _check_alike(a: Evaluation, b: Evaluation) -> None:
    if (
        not all(np.array_equal(a.truth[name], b.truth[name]) for name in a.truth)
        or not np.array_equal(a.image_ids, b.image_ids)
        or a.class_names != b.class_names
    ):
        raise ValueError(
            f"The two evaluations have different data: {a.data_name!r} with {len(a.image_ids)} images and {b.data_name!r} with "
            f"{len(b.image_ids)} images. Evaluate both detectors on the same images."
        )
    if a.seed != b.seed or len(a.samples) != len(b.samples) or not len(a.samples):
        raise ValueError(
            f"The two evaluations have {len(a.samples)} resamples with seed {a.seed} and {len(b.samples)} with seed {b.seed}. "
            "Evaluate both with the same num_bootstrap, above 0, and the same seed."
        )
