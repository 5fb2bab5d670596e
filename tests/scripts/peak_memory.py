"""Train a few steps and compare the peak of the process with the forecast, for test_memory_forecast.py: peak_memory.py <folder>."""

import json
import sys
from pathlib import Path

from dino_hf import DinoDetrImageProcessor
from dino_hf.common.scenes import make_scenes
from dino_hf.run import training_run as run
from helpers import tiny_config
from measuring import resident_memory
from processes import leave

SETTINGS = {
    "batch_size": 4,
    "max_steps": 3,
    "use_cpu": True,
    "report_to": "none",
    "num_denoising": 20,
    "recipe": "scratch",
}
SIZES = {"short_sides": [384], "longest_side": 512, "crop": 0.0}


def main(folder: Path) -> None:
    for name, count, seed in (("train", 8, 0), ("validation", 4, 1)):
        make_scenes(folder / "data" / name, count, seed=seed)
    wide = {"d_model": 128, "encoder_ffn_dim": 512, "decoder_ffn_dim": 512, "num_queries": 100}
    tiny_config(num_denoising=20, **wide).save_pretrained(folder / "untrained")
    DinoDetrImageProcessor(size={"shortest_edge": 384, "longest_edge": 512}).save_pretrained(folder / "untrained")
    run.keep_weights = run.leave_results = lambda *args: (
        None,
        None,
    )  # pictures and reports are no part of the forecast
    done = run.train(
        folder / "data", model=folder / "untrained", output_dir=folder / "out", eval_steps=3, **SETTINGS, **SIZES
    )
    peak = resident_memory("VmHWM")  # ru_maxrss would be that of the tests, if they had more: it passes to the child
    (folder / "memory.json").write_text(json.dumps({"peak": peak} | done.preflight.memory))
    leave()


main(Path(sys.argv[1]))
