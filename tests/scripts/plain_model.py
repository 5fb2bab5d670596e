"""Results of a saved model in a package whose file runtime/cpu_speed.py was deleted: plain_model.py FOLDER."""

import sys
from pathlib import Path

import torch
from torch import Tensor

from dino_hf import DinoDetrForObjectDetection


def results(folder: Path) -> dict[str, Tensor]:
    """Outputs, losses and gradients of the model in `folder` for the inputs beside it."""
    inputs = torch.load(folder / "inputs.pt")
    model = DinoDetrForObjectDetection.from_pretrained(folder)
    with torch.no_grad():
        outputs = model(inputs["pixel_values"], inputs["pixel_mask"], output_hidden_states=True)
    torch.manual_seed(0)  # the noise of denoising
    trained = model.train()(**inputs)
    trained.loss.backward()
    return {
        "logits": outputs.intermediate_logits,
        "boxes": outputs.intermediate_pred_boxes,
        "memory": outputs.encoder_last_hidden_state,
        "loss": trained.loss.detach(),
        **{f"loss of {name}": value for name, value in trained.loss_dict.items()},
        **{f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in map(Path, sys.argv[1:]):
        torch.save(results(folder), folder / "plain.pt")
    loaded = [name for name in sys.modules if name.endswith("cpu_speed")]
    assert not loaded, loaded
