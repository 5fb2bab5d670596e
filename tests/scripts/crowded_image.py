"""Train one step on images with ever more boxes; prints the peak memory, in MiB, after each."""

import re
import sys
from pathlib import Path

import torch

from dino_hf import DinoDetrConfig, DinoDetrForObjectDetection
from helpers import RESNET


def main():
    torch.manual_seed(0)
    config = DinoDetrConfig(
        backbone_config=dict(RESNET),
        num_labels=80,
        encoder_layers=1,
        num_queries=300,
        encoder_ffn_dim=256,
        decoder_ffn_dim=256,
    )
    config.mask_denoising_padding = sys.argv[1] == "masked"
    model = DinoDetrForObjectDetection(config).train()
    for largest in map(int, sys.argv[2:]):
        labels = [
            {
                "class_labels": torch.randint(80, (count,)),
                "boxes": torch.cat([0.3 + 0.4 * torch.rand(count, 2), 0.01 + 0.1 * torch.rand(count, 2)], dim=1),
            }
            for count in (largest, 3)
        ]
        model(torch.randn(2, 3, 256, 256), labels=labels).loss.backward()
        model.zero_grad()
        # getrusage would begin with the peak of the process that started this one
        print(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024, flush=True)


main()
