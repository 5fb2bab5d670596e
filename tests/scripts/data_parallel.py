"""Each process computes its share of one batch; losses and gradients must be those of the whole batch on one process."""

import sys

import torch
from recipe import load_manifest, make_images, make_labels
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from dino_hf import DinoDetrForObjectDetection
from helpers import tiny_config, tiny_labels
from processes import leave


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def own_share(pixel_values, pixel_mask, labels):
    """Every n-th image, from the number of this process on; padded as in the whole batch."""
    part = slice(distributed.get_rank(), None, distributed.get_world_size())
    return {"pixel_values": pixel_values[part], "pixel_mask": pixel_mask[part], "labels": labels[part]}


def mean(value):
    value = value.detach().clone()
    distributed.all_reduce(value)
    return value / distributed.get_world_size()


def compare(model, batch, rtol, **settings):
    """One step on the whole batch in every process, and one on its shares. Returns the losses of the latter by name."""
    model.zero_grad()
    # All processes have all boxes here, so their average is the number of boxes of the batch, as on one process.
    whole = model(*batch)
    whole.loss.backward()
    expected = gradients(model)
    model.zero_grad()
    parallel = DistributedDataParallel(model, **settings)
    part = parallel(**own_share(*batch))
    part.loss.backward()
    found = gradients(model)
    torch.testing.assert_close(mean(part.loss), whole.loss.detach(), rtol=rtol, atol=1e-6)
    assert set(part.loss_dict) == set(whole.loss_dict)
    total = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        # Some gradients are nothing but rounding, as those of the bias of keys, to which softmax is blind.
        distance, limit = (found[name] - value).norm(), rtol * value.norm() + 1e-7 * total
        assert distance <= limit, (name, distance.item(), value.norm().item(), total.item())
    return {name: mean(value) for name, value in part.loss_dict.items()}


def toy_batch(counts):
    pixel_values, pixel_mask = torch.randn(len(counts), 3, 64, 104), torch.ones(len(counts), 64, 104, dtype=torch.long)
    pixel_mask[1::2, 48:] = 0
    pixel_mask[1::2, :, 40:] = 0
    return pixel_values * pixel_mask[:, None], pixel_mask, tiny_labels(*counts)


def toy_model(**changes):
    torch.manual_seed(0)  # the same weights in every process
    model = DinoDetrForObjectDetection(tiny_config(**changes)).train()
    torch.manual_seed(1)
    return model


def main():
    distributed.init_process_group("gloo")
    world_size = distributed.get_world_size()

    # Without denoising, whatever the counts: also where one process has no boxes. (Below one box for each process, the release's
    # rule of at least 1 divides by more than there are; the trainer's, which counts all boxes of a step, does not.)
    # 1e-5 of a norm: float32, and another order of sums.
    for counts, settings in (([3, 0, 1, 2], {"find_unused_parameters": True}), ([5, 0, 4, 0], {"static_graph": True})):
        compare(toy_model(num_denoising=0), toy_batch(counts), rtol=1e-5, **settings)
    # With denoising, where the largest counts of the processes agree; without noise, which every process draws for itself.
    still = {"num_denoising": 50, "label_noise_ratio": 0.0, "box_noise_scale": 0.0}
    for counts in ([3, 3, 1, 0], [2, 2, 2, 2]):
        compare(toy_model(**still), toy_batch(counts), rtol=1e-5)
    # With denoising, and a process without boxes: its label embedding still takes part.
    for counts in ([5, 0, 4, 0], [0, 0, 0, 0]):
        for _ in range(2):  # a gradient that is missing shows in the second step
            model = toy_model(num_denoising=50)
            model = DistributedDataParallel(model)
            model(**own_share(*toy_batch(counts))).loss.backward()
            assert all(one.grad.isfinite().all() for one in model.parameters() if one.requires_grad)

    # The recorded training step of the original release, one image on each process.
    if len(sys.argv) > 1:
        variant, folder = sys.argv[1:]
        manifest = load_manifest(variant)
        assert len(manifest["images"]) == world_size
        # The processes have 5 and 3 boxes, so their denoising groups cannot agree.
        model = DinoDetrForObjectDetection.from_pretrained(folder, num_denoising=0).train()
        batch = (*make_images(manifest), make_labels(manifest))
        losses = compare(model, batch, rtol=2e-5)
        recorded = manifest["training"]["losses"]
        for name, value in losses.items():
            if name != "class_error" and not name.startswith("cardinality"):  # those are means over images
                # as in test_recordings.py
                torch.testing.assert_close(value.item(), recorded[name], rtol=2e-5, atol=1e-6)
        assert len([name for name in recorded if "_dn" not in name and name in losses]) > 30
    distributed.destroy_process_group()
    leave()


main()
