"""Old classes in two processes, for test_old_classes.py: torchrun old_classes.py <data> <old detector> <new folder>.

Both processes get the boxes that one process gets, but for rounding.
"""

import sys
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from dino_hf.data import load_data
from dino_hf.run.old_classes import find_old_classes
from dino_hf.run.record import RunRecord
from processes import leave


def main(data: Path, model: Path, output_dir: Path) -> None:
    record = RunRecord(output_dir, {})
    record.values["model"] = str(model)
    old = find_old_classes(record, load_data(data), True, Console())
    gathered = [None, None]
    dist.all_gather_object(gathered, old)
    assert gathered[0] == gathered[1]
    counts = {name: sum(map(len, images.values())) for name, images in old.boxes.items()}
    assert len(old.boxes["train"]) == 10
    assert len(old.boxes["validation"]) == 6
    assert min(counts.values()) > 0, counts
    dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
