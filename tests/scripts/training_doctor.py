"""Trains a little under a doctor, on as many processes as it is started on, and writes what the doctor logged."""

import json
import sys
import tempfile
from pathlib import Path

import torch
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from transformers import TrainerCallback, set_seed

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.training import load_coco
from dino_hf.training.diagnosis import TrainingDoctor, gradient_norms
from helpers import small_trainer, tiny_config

PROCESSOR = DinoDetrImageProcessor(
    size={"height": 72, "width": 104}
)  # without padding, images do not depend on their batch


class Nudge(TrainerCallback):
    """Moves the weights, the same way on any number of processes."""

    def on_epoch_begin(self, args, state, control, model, **kwargs):
        generator = torch.Generator().manual_seed(state.global_step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def logged_figures(folder: Path, num_processes: int) -> list[dict[str, float]]:
    """What the doctor logs of two epochs over the data in `folder`, 2 images a step."""
    train = load_coco(folder / "train" / "annotations.json", folder / "train")
    held_out = load_coco(folder / "eval" / "annotations.json", folder / "eval", like=train)
    set_seed(0)
    model = DinoDetrForObjectDetection(tiny_config(num_denoising=10, id2label=train.id2label))
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = small_trainer(
            (train, held_out),
            output_dir,
            model,
            PROCESSOR,
            per_device_train_batch_size=2 // num_processes,
            per_device_eval_batch_size=2,
            num_train_epochs=2,
            learning_rate=0.0,  # the noise of denoising differs between processes: only `Nudge` may move the weights
            logging_steps=4,
            eval_strategy="epoch",
        )
        trainer.compute_metrics = None
        trainer.add_callback(Nudge())
        trainer.add_callback(TrainingDoctor(trainer, k=4))
        trainer.train()
    return [entry for entry in trainer.state.log_history if any(name.startswith("doctor/") for name in entry)]


def check_norms_of_sharded_gradients() -> None:
    mesh = init_device_mesh("cpu", (2,))
    values = [torch.arange(1.0, 6.0), torch.ones(3, 4)]
    parameters = [torch.nn.Parameter(distribute_tensor(value, mesh, [Shard(0)])) for value in values]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    norms = gradient_norms({"sharded": parameters, "frozen": [torch.nn.Parameter(values[0])]})
    torch.testing.assert_close(norms, {"sharded": torch.tensor(55.0 + 12.0).sqrt()})


if __name__ == "__main__":
    figures = logged_figures(Path(sys.argv[1]), num_processes=2)
    rank = torch.distributed.get_rank()
    Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(figures))
    check_norms_of_sharded_gradients()
