"""Layers for `kernels.kernelize`: they take over the forward of layers with the same name in other libraries' models."""

from typing import List, Tuple

from torch import Tensor, nn

from ._functions import ms_deform_attn


class MultiScaleDeformableAttention(nn.Module):
    """Stands in for the layer of this name in transformers (Deformable DETR, Grounding DINO, RT-DETR and others)."""

    has_backward = True
    can_torch_compile = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: List[Tuple],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ):
        """value (B, S, H, D), sampling_locations (B, Q, H, L, P, 2), attention_weights (B, Q, H, L, P) -> (B, Q, H * D).

        The shapes come as a tensor and as a list; the list is read, which spares a wait for the GPU. The other arguments
        belong to an older kernel.
        """
        return ms_deform_attn(value, value_spatial_shapes_list, sampling_locations, attention_weights)
