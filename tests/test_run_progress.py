"""Lines and the time left, from made-up clocks."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from dino_hf.run import progress as progress_module
from dino_hf.run.progress import BestApMetric, TrainingProgress, _duration
from dino_hf.training import get_recipe


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: clock.now)
    return clock


def make(terminal=False, **arguments):
    console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
    args = get_recipe("finetune").training_arguments("o", report_to="none", num_train_epochs=3, **arguments)
    state = TrainerState(max_steps=12, num_train_epochs=3, global_step=0, epoch=0.0, is_world_process_zero=True)
    return TrainingProgress(console), args, state


def run_epoch(progress, args, state, clock, metrics, seconds=(1.0, 10.0, 5.0)) -> None:
    step, evaluation, saving = seconds
    for _ in range(4):
        clock.now += step
        state.global_step += 1
        progress.on_step_end(args, state, TrainerControl())
    state.epoch = state.global_step / 4
    progress.on_log(args, state, TrainerControl(), logs={"loss": 8.0 / state.epoch})
    progress.on_prediction_step(args, state, TrainerControl())
    clock.now += evaluation
    progress.on_evaluate(args, state, TrainerControl(), metrics=metrics)
    clock.now += saving
    progress.on_save(args, state, TrainerControl())


def test_a_line_for_each_epoch_and_the_best_is_marked(clock):
    progress, args, state = make()
    progress.on_train_begin(args, state, TrainerControl())
    scores = [(0.2, 0.1), (0.1, 0.3), (0.25, 0.2)]
    for ap, average in scores:
        metrics = {"eval_loss": 5.0, "eval_AP": ap, "eval_AP50": 0.5, "eval_ema_AP": average}
        run_epoch(progress, args, state, clock, metrics)
    progress.on_train_end(args, state, TrainerControl())
    # Two epochs are left after the first, when nobody knows yet how long saving takes.
    assert progress.console.file.getvalue().splitlines() == [
        "epoch 1 of 3: loss 8.00, held-out loss 5.00, AP 0.200, AP50 0.500, AP of the average 0.100, best so far, 28 s left",
        "epoch 2 of 3: loss 4.00, held-out loss 5.00, AP 0.100, AP50 0.500, AP of the average 0.300, best so far, 19 s left",
        "epoch 3 of 3: loss 2.67, held-out loss 5.00, AP 0.250, AP50 0.500, AP of the average 0.200",
    ]


def test_without_a_terminal_there_is_a_line_each_minute(clock):
    progress, args, state = make(logging_steps=1)
    progress.on_train_begin(args, state, TrainerControl())
    for seconds, lines in ((59.9, 0), (0.1, 1), (59.9, 1), (60.0, 2)):
        clock.now += seconds
        state.global_step += 1
        progress.on_log(args, state, TrainerControl(), logs={"loss": 2.0 * state.global_step})
        progress.on_step_end(args, state, TrainerControl())
        assert len(progress.console.file.getvalue().splitlines()) == lines
    clock.now += 61.0
    progress.on_prediction_step(args, state, TrainerControl())
    printed = progress.console.file.getvalue().splitlines()
    assert printed[0].startswith("training, step 2 of 12: loss 3.00, ")
    assert printed[2].startswith("evaluating, step 4 of 12: loss 5.00, ")
    run_epoch(progress, args, state, clock, {"eval_AP": 0.1})  # the line of an epoch has the losses of all of it
    assert "loss 4.80, AP 0.100" in progress.console.file.getvalue().splitlines()[-1]


def test_the_time_left_has_evaluations_and_checkpoints_in_it(clock):
    progress, args, state = make()
    progress.on_train_begin(args, state, TrainerControl())
    assert progress.seconds_left(args, state) is None
    clock.now += 60  # the first step builds kernels
    state.global_step = 1
    progress.on_step_end(args, state, TrainerControl())
    assert progress.seconds_left(args, state) == 11 * 60
    clock.now += 2
    state.global_step = 2
    progress.on_step_end(args, state, TrainerControl())
    assert progress.seconds_left(args, state) == 10 * 2
    run_epoch(progress, args, state, clock, {"eval_AP": 0.1}, seconds=(2, 10, 5))  # to step 6
    assert progress.seconds_left(args, state) == 6 * 2 + 2 * (10 + 5)


def test_a_run_without_evaluation_has_lines_too(clock):
    progress, args, state = make(eval_strategy="no", max_steps=12)
    progress.on_train_begin(args, state, TrainerControl())
    progress.on_log(args, state, TrainerControl(), logs={"loss": 3.0})
    clock.now, state.global_step = 4.0, 4
    progress.on_step_end(args, state, TrainerControl())
    progress.on_epoch_end(args, state, TrainerControl())
    assert progress.console.file.getvalue() == "step 4 of 12: loss 3.00, 32 s left\n"


def test_other_processes_say_nothing(clock):
    progress, args, state = make(terminal=True)
    state.is_world_process_zero = False
    progress.on_train_begin(args, state, TrainerControl())
    run_epoch(progress, args, state, clock, {"eval_AP": 0.1})
    assert progress.console.file.getvalue() == ""


def test_a_terminal_has_a_bar(clock):
    progress, args, state = make(terminal=True)
    progress.on_train_begin(args, state, TrainerControl())
    run_epoch(progress, args, state, clock, {"eval_AP": 0.1})
    progress.close()
    progress.close()  # after an error, and at the end
    text = progress.console.file.getvalue()
    assert "epoch 1 of 3: loss 8.00, AP 0.100, best so far" in text
    assert "4/12" in text
    assert "loss 8.00" in text.rpartition("4/12")[2]


@pytest.mark.parametrize(
    ("metrics", "best"),
    [({"eval_AP": 0.2, "eval_ema_AP": 0.3}, 0.3), ({"eval_AP": 0.2}, 0.2), ({"eval_AP": -1.0}, -1.0)],
)
def test_the_best_of_both_is_among_the_metrics(metrics, best):
    _, args, state = make()
    BestApMetric().on_evaluate(args, state, TrainerControl(), metrics=metrics)
    assert metrics["eval_best_AP"] == best


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (89, "89 s"), (90, "1.5 min"), (800, "13 min"), (5400, "1.5 h"), (36000, "10 h")]
)
def test_durations_are_short(seconds, text):
    assert _duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (89.9, "90 s"), (90, "1.5 min"), (569.9, "9.5 min"), (570, "10 min"), (5399, "90 min"), (5400, "1.5 h"),
        (34199, "9.5 h"), (34200, "10 h"),
    ],
)  # fmt: skip
def test_borders_of_durations(seconds, text):
    assert _duration(seconds) == text
