"""Curves of a training run."""

from matplotlib.figure import Figure
from transformers import TrainerState

from dino_hf.run.curves import save_curves


def drawn(state: TrainerState, monkeypatch, path) -> Figure:
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (figures.append(self), save(self, *args, **kw)))
    save_curves(path, state)
    assert path.stat().st_size > 1000
    return figures[0]


def test_the_best_is_marked_and_a_curve_of_one_point_is_seen(monkeypatch, tmp_path):
    state = TrainerState()
    state.log_history = [
        {"epoch": 1.0, "step": 3, "loss": 9.0, "learning_rate": 2.5e-5},
        {"epoch": 1.0, "step": 3, "eval_loss": 8.0, "eval_AP": 0.25, "eval_ema_AP": 0.125},
        {"epoch": 2.0, "step": 6, "eval_loss": 7.0, "eval_AP": 0.125, "eval_ema_AP": 0.5},
    ]
    loss_axes, ap_axes, rate_axes = drawn(state, monkeypatch, tmp_path / "curves.png").axes
    training, held_out = loss_axes.lines
    assert (training.get_xydata().tolist(), training.get_marker()) == ([[1.0, 9.0]], "o")
    assert held_out.get_xydata().tolist() == [[1.0, 8.0], [2.0, 7.0]]
    assert {axes.get_xlim() for axes in (loss_axes, ap_axes, rate_axes)} == {(0, 2.06)}
    best = ap_axes.lines[-1]
    assert (best.get_xydata().tolist(), best.get_label()) == ([[2.0, 0.5]], "best: 0.500")
    assert rate_axes.yaxis.get_major_formatter()(2.5e-5, 0) == "2.5e-05"
    assert rate_axes.yaxis.get_offset_text().get_text() == ""
