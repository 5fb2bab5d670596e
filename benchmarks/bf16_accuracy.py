"""Compare the AP of a trained detector in float32 and in bfloat16, on the same images.

python benchmarks/bf16_accuracy.py --model outputs/demo/model --data outputs/demo/scenes

By default, it reads the folders that `make demo` writes.
"""

from dataclasses import dataclass, field

from common import Common, keep, read_arguments
from dino_hf.evaluation import compare, evaluate_model, load_split
from dino_hf.inference.predictor import Predictor

DTYPES = ("float32", "bfloat16")


@dataclass
class AccuracyArguments(Common):
    """Compare AP in float32 and in bfloat16."""

    model: str = field(default="outputs/demo/model", metadata={"help": "folder of a trained detector"})
    data: str = field(default="outputs/demo/scenes", metadata={"help": "folder of annotated images"})
    split: str = field(default="validation", metadata={"help": "part of the data"})
    batch_size: int = field(default=8, metadata={"help": "images per batch"})
    num_bootstrap: int = field(default=1000, metadata={"help": "number of bootstrap resamples for the interval"})


def main() -> None:
    arguments = read_arguments(AccuracyArguments)
    try:
        data, _ = load_split(arguments.data, arguments.split)
        evaluations = [
            evaluate_model(
                Predictor(arguments.model, device=arguments.device, dtype=dtype),
                data,
                batch_size=arguments.batch_size,
                num_bootstrap=arguments.num_bootstrap,
            )
            for dtype in DTYPES
        ]
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    difference = compare(*evaluations).differences[0]
    rows = [
        {"candidate": dtype, **{name: evaluation.metrics[name] for name in ("AP", "AP50", "AP75")}}
        for dtype, evaluation in zip(DTYPES, evaluations, strict=True)
    ]
    rows[1] |= {"difference": difference.difference, "interval_95": list(difference.interval)}
    counts = evaluations[0].counts
    keep("bf16_accuracy", {"images": counts["images"], "objects": counts["objects"]}, rows, arguments)
    for row in rows:
        print(f"  {row['candidate']:<9} AP {100 * row['AP']:.2f}, AP50 {100 * row['AP50']:.2f}")
    low, high = (100 * bound for bound in difference.interval)
    print(f"  difference {100 * difference.difference:+.2f} AP, 95 % {low:+.2f} to {high:+.2f}")


if __name__ == "__main__":
    main()
