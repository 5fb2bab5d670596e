"""Model, optimizer and schedule of `DinoDetrTrainer`: by the recipe, or by the user's arguments in place of it."""

from functools import partial

import torch
from transformers import PreTrainedModel

from .checks import check_classes
from .class_balance import class_weights
from .coco_data import CocoData
from .detector import find_detector
from .ema import ModelEma
from .evaluating import EvaluatingTrainer
from .hyperparameters import checked_space, highest_ap
from .optimizer import make_own_optimizer
from .recipe import Recipe
from .trainer_inputs import TrainerInputs
from .training_record import record_origin


class RecipeTrainer(EvaluatingTrainer):
    """`Trainer` that configures each model by a recipe, and takes optimizer and schedule from it."""

    recipe: Recipe
    _inputs: TrainerInputs
    _train_data: CocoData | None
    _resumed_from: str | None = None  # checkpoint of the running training
    _steps_per_epoch = 1
    _is_built = False  # whether Trainer.__init__ is done

    def call_model_init(self, trial=None) -> PreTrainedModel:
        """As in `Trainer`. The recipe configures each new model, and a new average of weights starts from it."""
        model = super().call_model_init(trial)
        self._configure(model)
        if self._is_built:
            self._adopt(model)
            record_origin(model)
            if self._resumed_from is not None:
                self._load_ema(self._resumed_from)
        return model

    def _configure(self, model: PreTrainedModel) -> None:
        check_classes(model, self._train_data, self._held_out)
        self.recipe.configure(find_detector(model))

    def _adopt(self, model: PreTrainedModel) -> None:
        """Use a configured model: set the options of its loss, and start an average of its weights."""
        detector, recipe = find_detector(model), self.recipe
        self._criterion = detector.criterion
        if detector.loss_function is detector.criterion or isinstance(detector.loss_function, partial):
            options = {"skip_non_finite": recipe.on_non_finite == "skip"}
            if recipe.class_weights is not None:
                options["class_weights"] = class_weights(self._train_data, recipe.class_weights).to(self.args.device)
            detector.loss_function = partial(detector.criterion, **options)
        elif recipe.class_weights is not None:
            raise ValueError("class_weights need the loss of the model, but model.loss_function is another one.")
        if recipe.ema_decay is not None:
            self.ema = ModelEma(model, recipe.ema_decay, recipe.ema_warmup_steps)

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """The optimizer of the recipe, or the user's class with the learning rates of the recipe for each part."""
        if self.optimizer is None:
            model = self.model if model is None else model
            if self.optimizer_cls_and_kwargs is None:
                self.optimizer = self.recipe.make_optimizer(model, self.args)
            else:
                rates = self.recipe.learning_rates(self.args)
                self.optimizer = make_own_optimizer(model, rates, *self.optimizer_cls_and_kwargs)
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer=None) -> torch.optim.lr_scheduler.LRScheduler:
        """The schedule of the recipe, created again in each `train`; or the schedule of the user."""
        if "schedule" not in self._inputs.replaced:
            optimizer = self.optimizer if optimizer is None else optimizer
            self.lr_scheduler = self.recipe.make_scheduler(optimizer, num_training_steps, self._steps_per_epoch)
        return self.lr_scheduler

    def hyperparameter_search(
        self, hp_space=None, compute_objective=None, n_trials: int = 20, direction=None, *args, **kwargs
    ):
        """As in `Trainer`, but by default the highest AP is searched, of the own or of the averaged weights.

        Args:
            hp_space: trial -> values by name, of fields of `TrainingArguments` that the recipe does not set.
            compute_objective: metrics -> number. None: AP.
            direction: "maximize" or "minimize". None: "maximize" for AP, otherwise "minimize".
        Raises:
            ValueError: the trainer has no `model_init`, or a searched value would have no effect.
        """
        if self.model_init is None:
            raise ValueError("A search needs a new model for each trial: give model_init in place of model.")
        if direction is None:
            direction = "maximize" if compute_objective is None else "minimize"
        objective = compute_objective or partial(highest_ap, prefix=self._main_prefix)
        space = hp_space and partial(checked_space, hp_space)
        return super().hyperparameter_search(space, objective, n_trials, direction, *args, **kwargs)
