"""The stock Trainer with FSDP2, on GPUs: two steps, and a saved folder that loads."""

import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForObjectDetection, set_seed

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.common.scenes import make_scenes
from dino_hf.training import load_coco
from helpers import small_trainer, tiny_config
from processes import leave


def main(folder):
    rank = os.environ["RANK"]
    data = []
    for part, seed in (("train", 0), ("eval", 1)):
        path = folder / f"{part}_{rank}"
        annotations = make_scenes(path, 6, seed)
        data.append(load_coco(annotations, path, like=data[0] if data else None))
    set_seed(0)
    trainer = small_trainer(
        data,
        folder,
        DinoDetrForObjectDetection(tiny_config(num_denoising=10, id2label=data[0].id2label)),
        DinoDetrImageProcessor(size={"shortest_edge": 72, "longest_edge": 112}),
        use_cpu=False,
        max_steps=2,
        fsdp="full_shard auto_wrap",
        fsdp_config={"fsdp_version": 2, "reshard_after_forward": True, "state_dict_type": "FULL_STATE_DICT"},
    )
    trainer.train()
    trainer.save_model(str(folder / "model"))
    trainer.accelerator.wait_for_everyone()
    model = AutoModelForObjectDetection.from_pretrained(folder / "model")
    assert all(value.isfinite().all() for value in model.state_dict().values())
    torch.distributed.destroy_process_group()
    leave()


main(Path(sys.argv[1]))
