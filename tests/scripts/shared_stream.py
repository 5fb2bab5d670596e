"""Two processes read a stream with other rows each time: torchrun shared_stream.py FOLDER (test_training_run.py)."""

import random
import sys
from pathlib import Path

import torch.distributed as dist
from datasets import IterableDataset

from dino_hf.run.data import read_streams
from processes import leave


def rows():
    yield {"number": random.SystemRandom().randrange(2**60)}


def main(folder: Path) -> None:
    def read():
        with (folder / "reads").open("a") as file:
            file.write("read\n")
        yield from rows()

    data = read_streams({"train": IterableDataset.from_generator(read)}, str(folder / "out"), use_cpu=True)
    numbers = [None, None]
    dist.all_gather_object(numbers, data["train"]["number"][:])
    assert numbers[0] == numbers[1], numbers
    assert len(numbers[0]) == 1
    assert (folder / "reads").read_text() == "read\n"
    assert not (folder / "out").exists()
    dist.barrier()
    leave()


main(Path(sys.argv[1]))
