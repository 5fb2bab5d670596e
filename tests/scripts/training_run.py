"""`DinoDetrTrainer` in several processes, for test_dino_trainer.py: torchrun training_run.py <folder with data> <empty folder>."""

import math
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback, set_seed
from transformers.utils import logging

from dino_hf import DinoDetrForObjectDetection, DinoDetrImageProcessor
from dino_hf.training import DetectionCollator, class_weights, load_coco
from dino_hf.training.augmentation import Augmentation
from dino_hf.training.recipes import get_recipe
from dino_hf.training.trainer import DinoDetrTrainer
from helpers import QUIET, tiny_config
from processes import leave

PROCESSOR = DinoDetrImageProcessor(size={"shortest_edge": 48, "longest_edge": 64})
SMALL = {"short_sides": (40,), "longest_side": 60, "crop_short_sides": (40,), "crop_sizes": (32, 38)}
RANK = 0


def make_trainer(data, folder, num_denoising=0, augmentation=None, callbacks=None, held_out=None, **settings):
    names = ("ema_decay", "on_non_finite", "repeat_threshold", "class_weights")
    recipe = get_recipe(
        "finetune",
        learning_rate=1e-3,
        early_stopping_patience=None,
        augmentation=augmentation or Augmentation(horizontal_flip=0.0, crop=0.0, **SMALL),
        model_settings={"num_denoising": num_denoising},
        **{"ema_decay": None} | {name: settings.pop(name) for name in names if name in settings},
    )
    set_seed(0)
    classes = {"num_labels": len(data.id2label), "id2label": data.id2label}
    model = DinoDetrForObjectDetection(tiny_config(num_denoising=num_denoising, **classes))
    common = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
    }
    args = recipe.training_arguments(folder, **QUIET | common | settings)
    return DinoDetrTrainer(
        model, args, recipe=recipe, train=data, held_out=held_out, image_processor=PROCESSOR, callbacks=callbacks
    )


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(first: dict, second: dict) -> None:
    assert set(first) == set(second)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def assert_same_everywhere(tensors: dict) -> None:
    for name, value in tensors.items():
        values = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(values, value.contiguous())
        assert all(torch.equal(value, other) for other in values), name


def check_window(data, folder: Path) -> None:
    """Two processes with two batches each of one image, two of which have no boxes, against all four images at once."""
    for average in (True, False):
        gradients = {}

        class Spy(torch.optim.SGD):
            def step(self, closure=None):
                gradients.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})  # noqa: B023

        trainer = make_trainer(
            data,
            folder / f"window-{average}",
            max_steps=1,
            max_grad_norm=0,
            train_sampling_strategy="sequential",
            average_tokens_across_devices=average,
        )
        trainer.optimizer = Spy(trainer.model.parameters(), lr=0.0)
        trainer.train()

        set_seed(0)
        model = DinoDetrForObjectDetection(trainer.model.config)
        model.load_state_dict(trainer.model.state_dict())
        images = DetectionCollator()([trainer.train_dataset[index] for index in range(4)])
        loss = model.train()(**images).loss
        loss.backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        # float32, and sums in another order; what is left of them is the gradient of a key's bias. The group norm of the coarsest
        # level, two cells of two channels here, makes 300 times as much of what rounding a convolution of one image or of four
        # leaves: measured 6e-6.
        rounding = 1e-5 * max(gradient.abs().max().item() for gradient in expected.values())
        assert set(gradients) == set(expected)
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-5, atol=rounding, msg=lambda text, name=name: f"{name}: {text}"
            )
        logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
        assert math.isclose(logged, loss.item(), rel_tol=1e-5)


def check_balance(data, folder: Path) -> None:
    """Two processes share the images of an epoch, repeated ones included. Class weights give the losses of one process.

    All images have one size, because padding changes group norms.
    """
    seen, settings = [], {"num_train_epochs": 2, "max_grad_norm": 0, "augmentation": Augmentation(crop=0.0, **SMALL)}
    options = {"repeat_threshold": 1.0, "class_weights": "balanced"}

    class Seen(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append([int(image) for batch in trainer._image_ids for image in batch])

    trainer = make_trainer(data, folder / "balance", callbacks=[Seen()], **settings, **options)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.0)
    trainer.train()
    of_processes = [None, None]
    dist.all_gather_object(of_processes, seen)
    steps = [first + second for first, second in zip(*of_processes, strict=True)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    number = {image: index for index, image in enumerate(data.dataset["image_id"])}
    model = DinoDetrForObjectDetection(trainer.model.config)
    model.load_state_dict(trainer.model.state_dict())
    model.loss_function = partial(model.criterion, class_weights=class_weights(data, "balanced"))
    per_epoch = len(steps) // 2
    assert len(losses) == len(steps) == 2 * per_epoch, (len(losses), len(steps))
    for epoch in range(2):
        trainer._repeat_sampler.set_epoch(epoch)
        trainer._train_transform.set_epoch(epoch)
        drawn = [data.dataset["image_id"][index] for index in trainer._repeat_sampler]
        assert max(Counter(drawn).values()) > 1, drawn
        here = slice(epoch * per_epoch, (epoch + 1) * per_epoch)
        # accelerate fills up the last batches with the first images
        filled = drawn + drawn[: -len(drawn) % 2]
        assert Counter(image for step in steps[here] for image in step) == Counter(filled), (drawn, steps[here])
        for step, loss in zip(steps[here], losses[here], strict=True):
            images = DetectionCollator()([trainer.train_dataset[number[image]] for image in step])
            expected = model.train()(**images).loss.item()
            assert math.isclose(loss, expected, rel_tol=1e-5), (epoch, step, loss, expected)


def check_resume(data, held_out, folder: Path) -> None:
    """7 images in two processes are four batches each and two steps in an epoch; step 3 is in the middle of the second."""
    settings = {
        "num_denoising": 10,
        "augmentation": Augmentation(**SMALL),
        "ema_decay": 0.8,
        "held_out": held_out,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 3,
        "eval_strategy": "steps",
        "eval_steps": 2,
    }
    seeds = []

    class Seeds(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            model.register_forward_pre_hook(
                lambda module, args: seeds.append(torch.initial_seed()) if module.training else None
            )

    whole = make_trainer(data, folder / "whole", callbacks=[Seeds()], **settings)
    whole.train()
    all_seeds = [None, None]
    dist.all_gather_object(all_seeds, seeds)
    assert len(set(all_seeds[0] + all_seeds[1])) == 16, all_seeds  # 2 processes, 4 steps, 2 batches
    assert_same_everywhere(state(whole.model))
    assert_same_everywhere(state(whole.ema.module))
    metrics = [entry for entry in whole.state.log_history if "eval_AP" in entry]
    assert len(metrics) == 2
    assert {"eval_loss", "eval_ema_loss", "eval_ema_AP"} <= set(metrics[0])

    dist.barrier()
    found = sorted(path.name for path in (folder / "whole").iterdir())
    assert found == ["checkpoint-3", "checkpoint-4", "recipe.json"], found
    assert {"rng_state_0.pth", "rng_state_1.pth", "ema"} <= {p.name for p in (folder / "whole/checkpoint-3").iterdir()}

    resumed = make_trainer(data, folder / "resumed", **settings)
    torch.manual_seed(RANK)
    resumed.train(resume_from_checkpoint=str(folder / "whole/checkpoint-3"))
    assert resumed.state.global_step == 4
    assert_same(state(resumed.model), state(whole.model))
    assert_same(state(resumed.ema.module), state(whole.ema.module))


def check_skip(data, folder: Path) -> None:
    """One process has a gradient that is not finite, in one batch: both leave out the step."""
    trainer = make_trainer(data, folder / "skip", max_steps=3, on_non_finite="skip", ema_decay=0.8)
    weights = []

    def spoil(gradient):
        return gradient * math.nan if trainer.state.global_step == 1 and RANK == 1 else gradient

    class Weights(TrainerCallback):
        def on_step_begin(self, args, run, control, **kwargs):
            weights.append(state(trainer.model))

    trainer.model.model.decoder.layers[0].self_attn_norm.weight.register_hook(spoil)
    trainer.add_callback(Weights())
    trainer.train()
    assert_same(weights[1], weights[2])
    assert trainer.ema.num_updates == 2
    assert_same_everywhere(state(trainer.model))
    assert [entry["skipped_steps"] for entry in trainer.state.log_history if "loss" in entry] == [0, 1, 0]


def check_held_out_loss(data, folder: Path) -> None:
    """Four images in two processes, in batches of three: two of them are repeated, and do not count."""
    trainer = make_trainer(data, folder / "held_out", held_out=data, per_device_eval_batch_size=3)
    total = num_boxes = 0
    for index in range(len(trainer.eval_dataset)):
        batch = DetectionCollator()([trainer.eval_dataset[index]])
        with torch.no_grad():
            total += trainer.model.eval()(**batch, num_items_in_batch=1).loss.item()
        num_boxes += int((batch["labels"]["class_labels"] >= 0).sum())
    loss = trainer.evaluate()["eval_loss"]
    assert math.isclose(loss, total / num_boxes, rel_tol=1e-5), (loss, total / num_boxes)


def main(data: Path, folder: Path) -> None:
    global RANK
    logging.disable_progress_bar()
    uneven = load_coco(data / "uneven/annotations.json", data / "uneven")
    train = load_coco(data / "train/annotations.json", data / "train")
    held_out = load_coco(data / "eval/annotations.json", data / "eval", like=train)
    # transformers 5.17 loads the optimizer of several processes on CPUs to "cpu:0", which torch does not know.
    torch.serialization.register_package(
        0, lambda storage: None, lambda storage, place: storage if place == "cpu:0" else None
    )
    dist.init_process_group("gloo")
    RANK = dist.get_rank()
    check_window(uneven, folder)
    check_held_out_loss(uneven, folder)
    check_balance(uneven, folder)
    check_resume(train, held_out, folder)
    check_skip(train, folder)
    dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
