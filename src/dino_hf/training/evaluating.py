"""Evaluations of `DinoDetrTrainer`: several held-out data sets, averaged weights, a loss independent of the batches."""

from contextlib import nullcontext

from torch import Tensor
from transformers.utils import ModelOutput

from ..data.tiled_data import tiled_images
from ..evaluation.evaluator import CocoEvaluator
from ..runtime.weights_digest import weights_digest
from .checkpoints import WholeCheckpointTrainer
from .coco_data import CocoData
from .detector import find_detector
from .losses import HeldOutLoss, count_boxes, num_own_images, score_first_images, weighted_parts


class EvaluatingTrainer(WholeCheckpointTrainer):
    """`Trainer` that evaluates each held-out data set by its own evaluator, with the own and with the averaged weights.

    Attributes:
        evaluator: the `CocoEvaluator` of the first held-out data set, or None.
    """

    evaluator: CocoEvaluator | None = None
    _evaluators: dict[str, CocoEvaluator]  # by name of the held-out data set
    _metrics: dict[str, tuple]  # compute_metrics and preprocess_logits_for_metrics of each held-out data set
    _held_out: dict[str, CocoData]
    _main_prefix = "eval"  # prefix of the metrics of the first held-out data set
    _held_out_loss: HeldOutLoss | None = None  # sums of the running evaluation

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """As in `Trainer`. Each held-out data set has its own evaluator."""
        metrics = self._metrics.get(eval_dataset) if isinstance(eval_dataset, str) else None
        if metrics is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        before = self.compute_metrics, self.preprocess_logits_for_metrics
        self.compute_metrics, self.preprocess_logits_for_metrics = metrics
        try:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self.compute_metrics, self.preprocess_logits_for_metrics = before

    def evaluation_loop(
        self, dataloader, description: str, prediction_loss_only=None, ignore_keys=None, metric_key_prefix: str = "eval"
    ):
        """As in `Trainer`. `evaluate` also evaluates the averaged weights and names their metrics `eval_ema_...`. The loss is
        the sum over all images divided by the number of boxes, independent of the batches."""
        arguments = (dataloader, description, prediction_loss_only, ignore_keys)
        output = self._evaluate_once(*arguments, metric_key_prefix)
        if self.ema is None or description == "Prediction":
            return output
        prefix = f"{metric_key_prefix}_ema"
        if self.ema.num_updates == 0:  # nothing is averaged yet
            averaged = {prefix + name.removeprefix(metric_key_prefix): value for name, value in output.metrics.items()}
            return output._replace(metrics=output.metrics | averaged)
        with self.ema.applied(), nullcontext() if self._doctor is None else self._doctor.paused():
            averaged = self._evaluate_once(*arguments, prefix)
        if metric_key_prefix == self._main_prefix and self.compute_metrics is self.evaluator is not None:
            tiles = tiled_images(self.evaluator.data)
            num_images = len(dataloader.dataset) if tiles is None else tiles.counts.images
            self._record_ema_evaluation(averaged.metrics, num_images)
        # Trainer uses the number of samples only to compute a rate, and both evaluations together had twice as many.
        return output._replace(
            metrics=output.metrics | averaged.metrics, num_samples=output.num_samples + averaged.num_samples
        )

    def _evaluate_once(self, *arguments):
        self._held_out_loss = HeldOutLoss(keeps_non_finite=not self.args.logging_nan_inf_filter)
        try:
            output = super().evaluation_loop(*arguments)
            means = self._held_out_loss.means(self.accelerator)
        finally:
            self._held_out_loss = None
        if f"{arguments[-1]}_loss" not in output.metrics:
            return output
        losses = {f"{arguments[-1]}_{name}": mean for name, mean in means.items()}
        return output._replace(metrics=output.metrics | losses)

    def _record_ema_evaluation(self, metrics: dict[str, float], num_images: int) -> None:
        training = (self.model.config.provenance or {}).get("training", {})
        scores = {name.removeprefix(f"{self._main_prefix}_ema_"): value for name, value in metrics.items()}
        self._ema_evaluation = {
            "dataset": next(iter(self._held_out.values())).name,
            "num_images": num_images,
            "step": training.get("steps", self.state.global_step),  # after training: the step of the best weights
            "metrics": {name: float(value) for name, value in scores.items() if name.startswith(("AP", "AR_"))},
        }
        if self.is_world_process_zero() and (digest := weights_digest(self.ema.module)):
            self._ema_evaluation["weights"] = digest

    def _loss_in_evaluation(self, model, inputs: dict) -> tuple[Tensor, ModelOutput]:
        """The loss of a batch and its outputs. Its sum is also added to the loss of the whole evaluation."""
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs | {"num_items_in_batch": 1}, return_outputs=True)
        num_boxes = count_boxes(labels)
        batch_size = len(labels["boxes"])
        count = num_own_images(self.accelerator, batch_size)
        own = {name: value[:count] for name, value in labels.items()}
        scored = outputs if count == batch_size else score_first_images(find_detector(model), outputs, labels, count)
        parts = weighted_parts(scored["loss_dict"], self._criterion)
        parts[-1] = scored["loss"]  # NaN if predictions were skipped
        self._held_out_loss.add(parts, count_boxes(own))
        return loss / num_boxes.clamp(min=1), outputs
