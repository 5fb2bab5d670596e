"""Prints how far the port is from the recordings of all projects (`make parity`): values, where the tests hold limits."""

import tempfile
from pathlib import Path

import torch
from recipe import FAMILY, VARIANTS, load_manifest, load_recorded, make_checkpoint, make_images, project_of
from test_recordings import gradient_norms, load_model, losses, train_step

from dino_hf import use_backend
from dino_hf.conversion.convert_checkpoint import convert


def relative(pairs) -> float:
    """Largest |a - b| / |b|, leaving out what is zero but for rounding."""
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
            folder = Path(scratch) / "converted"
            torch.save(make_checkpoint(variant), Path(scratch) / "checkpoint.pth")
            convert(Path(scratch) / "checkpoint.pth", folder, source=project_of(variant), assume_positions=True)
            for backend in ("cpu", "reference"):
                measure(variant, folder, backend)


if __name__ == "__main__":
    main()
