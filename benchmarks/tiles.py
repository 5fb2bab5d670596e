"""Train on whole images and on tiles of large drawn images with small objects, for the same number of steps.

    dino-hf scenes scenes
    dino-hf train scenes --model scenes/untrained --recipe scratch --max-steps 2000 --output-dir start
    python benchmarks/tiles.py start --output-dir outputs/tiles --steps 60 --seeds 0 1

The first two commands make the detector to start from. Images have 480 x 384 pixels, with objects of 14 to 64 pixels. AP is
measured on whole held-out images, with and without tiles, of the detectors trained on whole images and on tiles.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image

from dino_hf import train
from dino_hf.common.scenes import CATEGORIES, draw_scene
from dino_hf.evaluation import evaluate

SIZE, TILES = (480, 384), 128


def draw_large(folder: Path, num_images: int, seed: int) -> None:
    """Write images that each have 4 to 6 scenes on a plain noisy background, in COCO format."""
    folder.mkdir(parents=True)
    images, annotations = [], []
    for number in range(1, num_images + 1):
        rng = np.random.default_rng([seed, number])
        grain = rng.normal(rng.uniform(60, 190, 3), 6, (SIZE[1], SIZE[0], 3))
        canvas, taken = Image.fromarray(grain.clip(0, 255).astype(np.uint8)), []
        for _ in range(int(rng.integers(4, 7))):
            scene, objects = draw_scene(rng)
            x, y = (int(rng.integers(0, side - part)) for side, part in zip(SIZE, scene.size, strict=True))
            if any(abs(x - other[0]) < 121 and abs(y - other[1]) < 121 for other in taken):
                continue
            taken.append((x, y))
            canvas.paste(scene, (x, y))
            for entry in objects:
                left, top, width, height = entry["bbox"]
                moved = {"bbox": [left + x, top + y, width, height], "id": len(annotations) + 1, "image_id": number}
                annotations.append(entry | moved)
        canvas.save(folder / f"{number:04}.png", compress_level=1)
        images.append({"id": number, "file_name": f"{number:04}.png", "width": SIZE[0], "height": SIZE[1]})
    categories = [{"id": category_id, "name": name} for category_id, name in CATEGORIES.items()]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "annotations.json").write_text(json.dumps(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="detector to start from, trained on drawn scenes")
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/tiles"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--images", type=int, nargs=2, default=[40, 12], help="images to train on, and held-out images")
    args = parser.parse_args()
    data = args.output_dir / "data"
    for name, count, seed in zip(("train", "validation"), args.images, (11, 12), strict=True):
        draw_large(data / name, count, seed)
    before = [
        evaluate(args.model, data, tiles=tiles, num_bootstrap=0, allow_trained=True).metrics["AP"]
        for tiles in ("none", TILES)
    ]
    rows = [("not trained further", "", *before, 0.0)]
    print(rows[-1], flush=True)
    variants = {
        "whole images": {},
        f"tiles of {TILES}": {"tiles": TILES},
        "whole images, twice as large": {"short_sides": (192,), "longest_side": 240, "crop": 0.0},
    }
    for name, settings in variants.items():
        for seed in args.seeds:
            start, folder = time.perf_counter(), args.output_dir / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
            run = train(
                data,
                model=args.model,
                recipe="scratch",
                learning_rate=2e-4,
                output_dir=folder,
                seed=seed,
                max_steps=args.steps,
                eval_steps=args.steps,
                batch_size=4,
                report_to="none",
                **settings,
            )
            minutes = (time.perf_counter() - start) / 60
            other = evaluate(folder, data, tiles="none" if "tiles" in settings else TILES, num_bootstrap=0)
            with_tiles, whole = (run.evaluation, other) if "tiles" in settings else (other, run.evaluation)
            rows.append((name, seed, whole.metrics["AP"], with_tiles.metrics["AP"], minutes))
            print(rows[-1], flush=True)
    print("\n| trained on | seed | AP without tiles | AP with tiles | minutes |\n| --- | --- | --- | --- | --- |")
    for name, seed, whole, with_tiles, minutes in rows:
        print(f"| {name} | {seed} | {whole:.3f} | {with_tiles:.3f} | {minutes:.1f} |")


if __name__ == "__main__":
    main()
