"""Two processes get the same AP on tiles as one process. The last batch has repeated tiles."""

import sys
from pathlib import Path

import numpy as np
import torch

import test_tile_training as tests
from dino_hf.data import cut_into_tiles
from dino_hf.evaluation import evaluator
from dino_hf.training import load_coco
from processes import leave
from tile_toys import TILES

folder = Path(sys.argv[1])
data = load_coco(folder / "other.json", folder)
assert len(cut_into_tiles(data, TILES).dataset) % 2, "no tile is repeated"
scored = []
evaluate_in_parts = evaluator._evaluate_in_parts
evaluator._evaluate_in_parts = lambda *parts: scored.append(parts) or evaluate_in_parts(*parts)
trainer = tests.make_trainer((data, data), folder / "run", batch_size=1)  # without padding
assert trainer.args.world_size == 2
metrics = trainer.evaluate()
expected = np.load(folder / "expected.npz")
found = scored[0][1]
order, other = (np.lexsort((values["scores"], values["image_id"])) for values in (found, expected))
np.testing.assert_array_equal(found["image_id"][order], expected["image_id"][other])
np.testing.assert_allclose(found["scores"][order], expected["scores"][other], rtol=1e-3)
gathered: list = [None, None]
torch.distributed.all_gather_object(gathered, metrics["eval_loss"])
assert gathered[0] == gathered[1]
np.testing.assert_allclose(metrics["eval_loss"], expected["loss"], rtol=1e-4)
leave()
