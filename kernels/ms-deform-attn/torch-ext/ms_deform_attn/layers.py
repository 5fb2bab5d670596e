"""Layers for `kernels.kernelize`: they replace the forward of layers with equal names in models of other libraries."""

from typing import List, Tuple

from torch import Tensor, nn

from ._functions import ms_deform_attn


class MultiScaleDeformableAttention(nn.Module):
    """Replaces the layer of this name in transformers (Deformable DETR, Grounding DINO, RT-DETR and others)."""

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

        Shapes are given as a tensor and as a list. Only the list is read: reading the tensor would synchronise with the
        GPU. The other arguments belong to an older kernel.
        """
        return ms_deform_attn(value, value_spatial_shapes_list, sampling_locations, attention_weights)
