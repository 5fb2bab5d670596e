"""Multi-scale deformable attention (arXiv:2010.04159, sec. 4.1), forward and backward, on CPU (C++) and CUDA (Triton).

Letters in shapes: B images, S tokens of all levels, H heads, D numbers per head, Q queries, L levels, P points.
"""

from . import layers
from ._functions import device_of_kernel, ms_deform_attn, ms_deform_attn_fused, vector_lanes

__all__ = ["device_of_kernel", "layers", "ms_deform_attn", "ms_deform_attn_fused", "vector_lanes"]
