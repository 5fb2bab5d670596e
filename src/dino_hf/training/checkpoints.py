"""A `Trainer` whose checkpoints are whole: a folder gets its name when all its files are written."""

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoint_files import UNFINISHED, checkpoints_by_age, discard, flush, loaded_from, write_checksums
from .diagnosis import TrainingDoctor
from .ema import EMA_FOLDER

_OWN_RANDOM_STATE = ("mps", "xpu")  # types of devices whose generator `Trainer` does not save


class WholeCheckpointTrainer(Trainer):
    """`Trainer` that writes a checkpoint to a hidden place and renames it when it is complete.

    `Trainer` writes a checkpoint under its final name, file by file, and deletes old ones in place. If it is killed meanwhile, it
    leaves an incomplete checkpoint that looks complete. No public method changes that, so private ones are overridden here.
    """

    _unfinished: Path | None = None  # where a checkpoint is being written
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
        self.state.best_model_checkpoint = (
            None if best is None else str(best)
        )  # Trainer has set a path in the hidden place
        self.accelerator.wait_for_everyone()  # every process has written its part
        if self.args.should_save:
            self.state.save_to_json(str(unfinished / name / TRAINER_STATE_NAME))
            if self._doctor is not None:
                self._doctor.save(unfinished / name)
            write_checksums(unfinished / name)
            flush(unfinished / name)
            if (run_dir / name).exists():
                discard(run_dir / name)
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
        with nullcontext() if checkpoint is None else loaded_from(Path(checkpoint), "rng_state.pth"):
            super()._load_rng_state(checkpoint)
        device, name = self.args.device, self._device_state_name()
        if checkpoint is None or device.type not in _OWN_RANDOM_STATE or not (Path(checkpoint) / name).is_file():
            return
        with loaded_from(Path(checkpoint), name):
            states = torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            if device.type in states:  # else the run was moved from another type of device
                torch.get_device_module(device).set_rng_state(states[device.type])

    def _device_state_name(self) -> str:
        return f"rng_state_device_{self.args.process_index}.pth"

    def _get_output_dir(self, trial) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is not None:
            return  # wait until the folder has its final name
        averaged = Path(checkpoint_folder) / EMA_FOLDER
        if averaged.is_dir() and self.is_world_process_zero():
            shutil.copytree(averaged, Path(self.args.output_dir) / EMA_FOLDER, dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def _rotate_checkpoints(self, run_dir: Path) -> None:
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        if limit is None or limit <= 0:
            return
        checkpoints = checkpoints_by_age(run_dir, self.state.global_step)
        others = [one for one in checkpoints[:-1] if best is None or one.name != Path(best).name]
        has_best = len(others) < len(checkpoints) - 1
        num_kept = max(0, limit - 1 - has_best)  # besides the newest and the best, which are always kept
        for checkpoint in others[: len(others) - num_kept]:
            discard(checkpoint)

    def _finalize_training(self, trial, *args, **kwargs):
        best = self.state.best_model_checkpoint
        if self.args.save_total_limit == 1 and best is not None and self.args.should_save:
            for checkpoint in checkpoints_by_age(Path(self._get_output_dir(trial)), self.state.global_step):
                if not os.path.samefile(checkpoint, best):
                    discard(checkpoint)
            shutil.rmtree(Path(self._get_output_dir(trial)) / UNFINISHED, ignore_errors=True)
        return super()._finalize_training(trial, *args, **kwargs)
