"""For `kernels benchmark`: encoder and decoder attention of a 4-scale detector at 800 x 1333, against PyTorch."""

import torch
from kernels.benchmark import Benchmark

SHAPES = ((100, 167), (50, 84), (25, 42), (13, 21))
HEADS, DIM, POINTS = 8, 32, 4


def reference(value, references, offsets, logits):
    """The fused form as a composite of grid_samples."""
    size = torch.tensor([(width, height) for height, width in SHAPES], device=value.device)
    locations = references[:, :, None, :, None] + offsets / size[:, None]
    weights = logits.flatten(-2).softmax(-1).transpose(1, 2).flatten(0, 1)[:, None]
    maps = value.permute(0, 2, 3, 1).flatten(0, 1).split([height * width for height, width in SHAPES], dim=-1)
    grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
    samples = [
        torch.nn.functional.grid_sample(level.unflatten(-1, shape), grid[:, :, i], align_corners=False)
        for i, (level, shape) in enumerate(zip(maps, SHAPES))
    ]
    out = (torch.cat(samples, dim=-1) * weights).sum(-1)
    return out.unflatten(0, (value.shape[0], HEADS)).permute(0, 3, 1, 2).flatten(-2)


class MultiScaleDeformableAttention(Benchmark):
    seed = 0

    def _setup(self, num_queries):
        tokens = sum(height * width for height, width in SHAPES)
        per_point = (1, num_queries or tokens, HEADS, len(SHAPES), POINTS)
        self.inputs = (
            torch.randn(1, tokens, HEADS, DIM, device=self.device),
            torch.rand(*per_point[:2], len(SHAPES), 2, device=self.device),
            torch.randn(*per_point, 2, device=self.device) * 3,
            torch.randn(per_point, device=self.device),
        )
        self.out = torch.empty(1, per_point[1], HEADS * DIM, device=self.device)

    def _run(self):
        value, references, offsets, logits = self.inputs
        self.out.copy_(self.kernel.ms_deform_attn_fused(value, SHAPES, references, offsets, logits))

    def setup_encoder(self):
        self._setup(None)

    def benchmark_encoder(self):
        self._run()

    def verify_encoder(self):
        return reference(*self.inputs)

    def setup_decoder(self):
        self._setup(900)

    def benchmark_decoder(self):
        self._run()

    def verify_decoder(self):
        return reference(*self.inputs)
