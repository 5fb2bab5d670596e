"""Checkpoints of `DinoDetrTrainer`: whole folders, with the averaged weights in them."""

import copy
import logging
import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME

from ..common.regular_files import read_settings
from .checkpoint_files import (
    UNFINISHED,
    check_moments,
    checkpoints_by_age,
    delete_checkpoint,
    describe_load_errors,
    sync_to_disk,
    write_checksums,
)
from .detector import find_detector
from .diagnosis import TrainingDoctor
from .ema import EMA_FOLDER, ModelEma

logger = logging.getLogger(__name__)

_OWN_RANDOM_STATE = ("mps", "xpu")  # types of devices whose generator `Trainer` does not save


class WholeCheckpointTrainer(Trainer):
    """`Trainer` that writes a checkpoint to a hidden folder and renames the folder when all files are written.

    `Trainer` writes a checkpoint under its final name, file by file, and deletes old checkpoints in place. If it is killed
    meanwhile, it leaves an incomplete checkpoint that looks complete. No public method changes that, so private methods are
    overridden here.

    Attributes:
        ema: average of the weights, saved in the folder `ema` of each checkpoint; or None.
    """

    ema: ModelEma | None = None
    _ema_evaluation: dict | None = None  # for the card of the averaged model
    _unfinished: Path | None = None  # hidden folder of the checkpoint that is being written
    _doctor: TrainingDoctor | None = None  # its matches are saved in each checkpoint

    def _save_checkpoint(self, model, trial) -> None:
        run_dir, name = Path(self._get_output_dir(trial)), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        best = self.state.best_global_step
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{best}" if best else None
        if best is None or not (best.name == name or best.is_dir()):
            best = self.state.best_model_checkpoint
        unfinished = run_dir / UNFINISHED
        if self.args.should_save:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._unfinished = unfinished
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._unfinished = None
        # Trainer has set a path in the hidden folder.
        self.state.best_model_checkpoint = None if best is None else str(best)
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.args.should_save:
            self.state.save_to_json(str(unfinished / name / TRAINER_STATE_NAME))
            if self._doctor is not None:
                self._doctor.save(unfinished / name)
            write_checksums(unfinished / name)
            sync_to_disk(unfinished / name)
            if (run_dir / name).exists():
                delete_checkpoint(run_dir / name)
            (unfinished / name).rename(run_dir / name)
            self._rotate_checkpoints(run_dir)
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        device = self.args.device
        if device.type in _OWN_RANDOM_STATE:
            state = torch.get_device_module(device).get_rng_state()
            torch.save({device.type: state}, Path(output_dir) / self._device_state_name())

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with nullcontext() if checkpoint is None else describe_load_errors(Path(checkpoint), "rng_state.pth"):
            super()._load_rng_state(checkpoint)
        device, name = self.args.device, self._device_state_name()
        if checkpoint is None or device.type not in _OWN_RANDOM_STATE or not (Path(checkpoint) / name).is_file():
            return
        with describe_load_errors(Path(checkpoint), name):
            states = torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            if device.type in states:  # otherwise the run has moved from another type of device
                torch.get_device_module(device).set_rng_state(states[device.type])

    def _device_state_name(self) -> str:
        return f"rng_state_device_{self.args.process_index}.pth"

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is not None:
            return  # not before the folder has its final name
        averaged = Path(checkpoint_folder) / EMA_FOLDER
        if averaged.is_dir() and self.is_world_process_zero():
            shutil.copytree(averaged, Path(self.args.output_dir) / EMA_FOLDER, dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def _rotate_checkpoints(self, run_dir: Path) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if limit is None or limit <= 0:
            return
        checkpoints = checkpoints_by_age(run_dir, self.state.global_step)
        others = [checkpoint for checkpoint in checkpoints[:-1] if best is None or checkpoint.name != Path(best).name]
        has_best = len(others) < len(checkpoints) - 1
        num_kept = max(0, limit - 1 - has_best)  # besides the newest and the best, which are always kept
        for checkpoint in others[: len(others) - num_kept]:
            delete_checkpoint(checkpoint)

    def _finalize_training(self, trial, *args, **kwargs):
        best = self.state.best_model_checkpoint
        if self.args.save_total_limit == 1 and best is not None and self.args.should_save:
            for checkpoint in checkpoints_by_age(Path(self._get_output_dir(trial)), self.state.global_step):
                if not os.path.samefile(checkpoint, best):
                    delete_checkpoint(checkpoint)
            shutil.rmtree(Path(self._get_output_dir(trial)) / UNFINISHED, ignore_errors=True)
        return super()._finalize_training(trial, *args, **kwargs)

    # The optimizer. A whole checkpoint may still not fit the model, and Trainer's errors do not name the file.

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with describe_load_errors(Path(checkpoint), OPTIMIZER_NAME):
            super()._load_optimizer_and_scheduler(checkpoint)
            check_moments(self.optimizer)

    # Averaged weights

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`. The averaged model is saved in the folder `ema` beside the model."""
        folder = Path(self.args.output_dir if output_dir is None else output_dir) / EMA_FOLDER
        if self.args.should_save and self.ema is not None and self.ema.num_updates:
            find_detector(self.ema.module).config = self._ema_config()
            self.ema.save(folder)
            self._save_config_of_adapters(folder, find_detector(self.ema.module).config)
            self.processing_class.save_pretrained(folder)
        elif self.args.should_save and ModelEma.is_saved(folder):
            logger.warning(
                "%s contains the averaged weights of an earlier run. It is deleted, because this run averages no weights.",
                folder,
            )
            shutil.rmtree(folder)
        super().save_model(output_dir, _internal_call)
        if self.args.should_save and output_dir is not None:
            self._save_config_of_adapters(Path(output_dir), self.model.config)

    def _save_config_of_adapters(self, folder: Path, config: PreTrainedConfig) -> None:
        """Save the configuration in a checkpoint of adapters. It has the evaluation of these weights, and peft does not save it."""
        if self._unfinished is not None and not isinstance(self.model, PreTrainedModel):
            config.save_pretrained(folder)

    def _ema_config(self):
        """The configuration of the model, with the evaluation of the averaged weights."""
        config = copy.deepcopy(self.model.config)
        training = (config.provenance or {}).get("training")
        if training is not None:
            training["evaluation"] = self._ema_evaluation
            training["recipe"]["average_of_weights"] = (
                f"exponential, decay {self.ema.decay}, {self.ema.warmup_steps} warm-up steps"
            )
        return config

    def _load_ema(self, checkpoint: str | Path) -> None:
        if self.ema is None:
            return
        folder = Path(checkpoint) / EMA_FOLDER
        if not folder.is_dir():
            logger.warning("%s has no averaged weights: a new average starts from its weights.", checkpoint)
            self.ema.restart()
            return
        with describe_load_errors(Path(checkpoint), EMA_FOLDER):
            self.ema.load(folder)
        if (folder / CONFIG_NAME).is_file():
            config = read_settings(folder / CONFIG_NAME)
            provenance = config.get("provenance") if isinstance(config, dict) else None
            training = provenance.get("training") if isinstance(provenance, dict) else None
            self._ema_evaluation = training.get("evaluation") if isinstance(training, dict) else None
