"""Print the largest differences from the recordings of all projects (`make parity`)."""

import tempfile
from pathlib import Path

import torch
from recipe import FAMILY, VARIANTS, convert_recorded, load_manifest, load_recorded, make_images, project_of
from test_recordings import gradient_norms, load_model, losses, train_step

from dino_hf import use_backend


def relative(pairs) -> float:
    """Largest |a - b| / |b|. Values b that are zero up to rounding are left out."""
    return max(abs(actual - expected) / abs(expected) for actual, expected in pairs if abs(expected) > 1e-6)


def measure(variant: str, folder: Path, backend: str) -> None:
    manifest, recorded = load_manifest(variant), load_recorded(variant, "eval_outputs")
    with use_backend(backend):
        with torch.no_grad():
            outputs = load_model(folder).eval()(*make_images(manifest))
        model, trained = train_step(variant, folder)
    logits = (outputs.intermediate_logits.transpose(0, 1) - recorded["logits"]).abs().max()
    boxes = (outputs.intermediate_pred_boxes.transpose(0, 1) - recorded["pred_boxes"]).abs().max()
    of_losses = relative((loss, expected) for _, loss, expected in losses(variant, trained))
    norms = relative((norm, expected) for _, norm, expected, _ in gradient_norms(variant, model))
    print(f"{variant:22} {backend:10} {logits:8.1e} {boxes:8.1e} {of_losses:8.1e} {norms:8.1e}", flush=True)


def main() -> None:
    print(
        f"{'':22} {'attention':10} {'logits':>8} {'boxes':>8} {'losses':>8} {'gradient norms'} (the last two relative)"
    )
    for variant in (*VARIANTS, *FAMILY):
        with tempfile.TemporaryDirectory() as scratch:
            folder = convert_recorded(variant, Path(scratch), source=project_of(variant), assume_positions=True)
            for backend in ("cpu", "reference"):
                measure(variant, folder, backend)


if __name__ == "__main__":
    main()
