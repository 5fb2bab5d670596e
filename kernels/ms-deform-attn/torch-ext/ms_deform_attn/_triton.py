"""Multi-scale deformable attention (arXiv:2010.04159, sec. 4.1) on CUDA, forward and backward, in Triton.

Letters: B images, S tokens of all levels, H heads, D channels of a head, Q queries, L levels, P points per level.

The operator has three forms, which share the kernels. Each samples the pixel `center + point * scale`, counted from the
centre of the first cell. The table shows x for a level with W columns; y uses its rows:

    references    points are            center         scale              weights are
    None          locations in [0, 1]   -0.5           W                  weights
    (B, Q, L, 2)  offsets in cells      x * W - 0.5    1                  logits, softmax over L * P
    (B, Q, L, 4)  offsets in boxes      x * W - 0.5    w * W * 0.5 / P    logits, softmax over L * P

Coordinates, softmax and sums are float32 for every input dtype: half precision is too coarse for pixels of a large map.
A sample is zero if it is outside the map or its coordinates are not finite. The gradient of its location is then zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

SIZES = ["S", "Q"]  # not specialised: they change with every batch, and each value would need its own compiled kernel


@triton.jit
def _load_pair(pointers):
    """Load two neighbouring numbers with one instruction, as float32."""
    return tl.split(tl.load(pointers[:, None] + tl.arange(0, 2)[None, :]).to(tl.float32))


@triton.jit
def _log_sum_exp(logits_ptr, query, H: tl.constexpr, LP: tl.constexpr, BLOCK_LP: tl.constexpr):
    """Logarithm of the sum of exponentials of the L * P logits of each query: (BLOCK_Q,)."""
    point = tl.arange(0, BLOCK_LP)[None, :]
    logits = tl.load(logits_ptr + query[:, None] * (H * LP) + point, mask=point < LP, other=float("-inf"))
    logits = logits.to(tl.float32)  # (BLOCK_Q, BLOCK_LP)
    largest = tl.max(logits, 1)
    return largest + tl.log(tl.sum(tl.exp(logits - largest[:, None]), 1))


@triton.jit
def _level(levels_ptr, references_ptr, query, level, L: tl.constexpr, P: tl.constexpr, REFERENCE_SIZE: tl.constexpr):
    """Height, width and first token of a level; center and scale of x and y as in the table above: (BLOCK_Q,) or ()."""
    height = tl.load(levels_ptr + level * 3)
    width = tl.load(levels_ptr + level * 3 + 1)
    start = tl.load(levels_ptr + level * 3 + 2).to(tl.int64)  # its offset in value may need 64 bits
    if REFERENCE_SIZE == 0:
        center_x, center_y, scale_x, scale_y = -0.5, -0.5, width.to(tl.float32), height.to(tl.float32)
    else:
        pointers = references_ptr + (query * L + level) * REFERENCE_SIZE
        x, y = _load_pair(pointers)
        center_x, center_y = x * width - 0.5, y * height - 0.5
        if REFERENCE_SIZE == 2:
            scale_x, scale_y = 1.0, 1.0
        else:
            box_width, box_height = _load_pair(pointers + 2)
            scale_x, scale_y = box_width * width * (0.5 / P), box_height * height * (0.5 / P)
    return height, width, start, center_x, center_y, scale_x, scale_y


@triton.jit
def _cell(x, y, height, width):
    """The four cells around each sample.

    Returns the index of the upper left cell, the shares of the right and lower cells, and masks: whether the sample is
    inside the map, and whether each cell is.
    """
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)  # false for NaN
    x = tl.where(inside, x, 0.0)  # before the cast: NaN, infinity and huge numbers have no integer
    y = tl.where(inside, y, 0.0)
    column, row = tl.floor(x), tl.floor(y)
    right, lower = x - column, y - row
    column, row = column.to(tl.int32), row.to(tl.int32)
    in_left, in_right = inside & (column >= 0), inside & (column < width - 1)
    in_upper, in_lower = row >= 0, row < height - 1
    masks = (in_left & in_upper, in_right & in_upper, in_left & in_lower, in_right & in_lower)
    return (row * width + column).to(tl.int64), right, lower, inside, masks


@triton.jit(do_not_specialize=SIZES)
def _forward_kernel(
    value_ptr,  # (B, S, H, D)
    levels_ptr,  # (L, 3)
    points_ptr,  # (B, Q, H, L, P, 2)
    weights_ptr,  # (B, Q, H, L, P)
    references_ptr,  # (B, Q, L, REFERENCE_SIZE) or None
    out_ptr,  # (B, Q, H, D)
    lse_ptr,  # (B, Q, H) or None
    S,
    Q,
    H: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    REFERENCE_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_LP: tl.constexpr,
):
    # Queries change fastest and images slowest. Programs that run together then sample one head of one image, which
    # fits into the cache.
    num_blocks = tl.cdiv(Q, BLOCK_Q)
    program = tl.program_id(0)
    first = program % num_blocks * BLOCK_Q
    head = program // num_blocks % H
    image = (program // num_blocks // H).to(tl.int64)
    query = tl.minimum(tl.arange(0, BLOCK_Q), Q - 1 - first)  # counted from `first`; beyond the end, the last query
    is_query = tl.arange(0, BLOCK_Q) < Q - first
    channel = tl.arange(0, BLOCK_D)[None, :]
    is_channel = channel < D

    # Pointers move to the program's first item in 64 bits. From there, offsets to its other queries fit into 32 bits.
    item = (image * Q + first) * H + head
    value_ptr += (image * S * H + head) * D
    points_ptr += item * (L * P * 2)
    weights_ptr += item * (L * P)
    if REFERENCE_SIZE > 0:
        references_ptr += (image * Q + first) * (L * REFERENCE_SIZE)
        lse = _log_sum_exp(weights_ptr, query, H, L * P, BLOCK_LP)  # (BLOCK_Q,)

    out = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for level in range(L):
        height, width, start, center_x, center_y, scale_x, scale_y = _level(
            levels_ptr, references_ptr, query, level, L, P, REFERENCE_SIZE
        )
        for point in tl.static_range(P):
            sample = query * (H * L * P) + level * P + point
            x, y = _load_pair(points_ptr + sample * 2)
            weight = tl.load(weights_ptr + sample).to(tl.float32)
            if REFERENCE_SIZE > 0:
                weight = tl.exp(weight - lse)
            cell, right, lower, _, masks = _cell(center_x + x * scale_x, center_y + y * scale_y, height, width)

            upper_ptr = value_ptr + (start + cell)[:, None] * (H * D) + channel  # (BLOCK_Q, BLOCK_D)
            lower_ptr = upper_ptr + width.to(tl.int64) * (H * D)
            upper_weight, lower_weight = weight * (1 - lower), weight * lower
            corner = tl.load(upper_ptr, mask=masks[0][:, None] & is_channel, other=0.0).to(tl.float32)
            out += (upper_weight * (1 - right))[:, None] * corner
            corner = tl.load(upper_ptr + H * D, mask=masks[1][:, None] & is_channel, other=0.0).to(tl.float32)
            out += (upper_weight * right)[:, None] * corner
            corner = tl.load(lower_ptr, mask=masks[2][:, None] & is_channel, other=0.0).to(tl.float32)
            out += (lower_weight * (1 - right))[:, None] * corner
            corner = tl.load(lower_ptr + H * D, mask=masks[3][:, None] & is_channel, other=0.0).to(tl.float32)
            out += (lower_weight * right)[:, None] * corner

    if REFERENCE_SIZE > 0:
        tl.store(lse_ptr + item + query * H, lse, mask=is_query)
    tl.store(out_ptr + item * D + query[:, None] * (H * D) + channel, out, mask=is_query[:, None] & is_channel)


@triton.jit
def _corner(value_ptr, grad_value_ptr, offset, mask, weight, grad_out, fixed_point):
    """Add each query's share to the gradient of one of its four cells.

    Returns the dot product of grad_out and the value of the cell: (BLOCK_Q,).
    """
    value = tl.load(value_ptr + offset, mask=mask, other=0.0).to(tl.float32)  # (BLOCK_Q, BLOCK_D)
    share = weight[:, None] * grad_out
    if fixed_point is not None:
        share = (share * fixed_point).to(tl.int64)
    tl.atomic_add(grad_value_ptr + offset, share, mask=mask, sem="relaxed")
    return tl.sum(value * grad_out, 1)


@triton.jit(do_not_specialize=SIZES)
def _backward_kernel(
    grad_out_ptr,  # (B, Q, H, D)
    value_ptr,  # (B, S, H, D)
    levels_ptr,  # (L, 3)
    points_ptr,  # (B, Q, H, L, P, 2)
    weights_ptr,  # (B, Q, H, L, P)
    references_ptr,  # (B, Q, L, REFERENCE_SIZE) or None
    out_ptr,  # (B, Q, H, D) or None
    lse_ptr,  # (B, Q, H) or None
    fixed_point_ptr,  # () or None
    grad_value_ptr,  # (B, S, H, D) float32, or int64 with a fixed point
    grad_points_ptr,  # (B, Q, H, L, P, 2)
    grad_weights_ptr,  # (B, Q, H, L, P)
    S,
    Q,
    H: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    P: tl.constexpr,
    REFERENCE_SIZE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_blocks = tl.cdiv(Q, BLOCK_Q)
    program = tl.program_id(0)
    first = program % num_blocks * BLOCK_Q
    head = program // num_blocks % H
    image = (program // num_blocks // H).to(tl.int64)
    query = tl.minimum(tl.arange(0, BLOCK_Q), Q - 1 - first)
    is_query = tl.arange(0, BLOCK_Q) < Q - first
    channel = tl.arange(0, BLOCK_D)[None, :]
    mask = is_query[:, None] & (channel < D)  # (BLOCK_Q, BLOCK_D)

    item = (image * Q + first) * H + head
    value_ptr += (image * S * H + head) * D
    grad_value_ptr += (image * S * H + head) * D
    points_ptr += item * (L * P * 2)
    grad_points_ptr += item * (L * P * 2)
    weights_ptr += item * (L * P)
    grad_weights_ptr += item * (L * P)
    out_offset = item * D + query[:, None] * (H * D) + channel
    grad_out = tl.load(grad_out_ptr + out_offset, mask=mask, other=0.0).to(tl.float32)
    if REFERENCE_SIZE > 0:
        references_ptr += (image * Q + first) * (L * REFERENCE_SIZE)
        lse = tl.load(lse_ptr + item + query * H)  # (BLOCK_Q,)
        # The gradient of a logit is weight * (gradient of the weight - mean). The mean is over the gradients of all
        # weights, weighted by the weights. It equals the dot product of grad_out and out, so no second pass is needed.
        out = tl.load(out_ptr + out_offset, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(grad_out * out, 1)  # (BLOCK_Q,)
    fixed_point = None
    if fixed_point_ptr is not None:
        fixed_point = tl.load(fixed_point_ptr)

    for level in range(L):
        height, width, start, center_x, center_y, scale_x, scale_y = _level(
            levels_ptr, references_ptr, query, level, L, P, REFERENCE_SIZE
        )
        for point in tl.static_range(P):
            sample = query * (H * L * P) + level * P + point
            x, y = _load_pair(points_ptr + sample * 2)
            weight = tl.load(weights_ptr + sample).to(tl.float32)
            if REFERENCE_SIZE > 0:
                weight = tl.exp(weight - lse)
            cell, right, lower, inside, masks = _cell(center_x + x * scale_x, center_y + y * scale_y, height, width)

            above = (start + cell)[:, None] * (H * D) + channel  # (BLOCK_Q, BLOCK_D)
            below = above + width.to(tl.int64) * (H * D)
            mask_00, mask_01 = masks[0][:, None] & mask, masks[1][:, None] & mask
            mask_10, mask_11 = masks[2][:, None] & mask, masks[3][:, None] & mask
            weight_0, weight_1 = weight * (1 - lower), weight * lower
            weight_00, weight_01 = weight_0 * (1 - right), weight_0 * right
            weight_10, weight_11 = weight_1 * (1 - right), weight_1 * right
            dot_00 = _corner(value_ptr, grad_value_ptr, above, mask_00, weight_00, grad_out, fixed_point)
            dot_01 = _corner(value_ptr, grad_value_ptr, above + H * D, mask_01, weight_01, grad_out, fixed_point)
            dot_10 = _corner(value_ptr, grad_value_ptr, below, mask_10, weight_10, grad_out, fixed_point)
            dot_11 = _corner(value_ptr, grad_value_ptr, below + H * D, mask_11, weight_11, grad_out, fixed_point)

            # Bilinear interpolation of the four products, and its derivatives: (BLOCK_Q,) each.
            slope_0, slope_1 = dot_01 - dot_00, dot_11 - dot_10
            dot_0, dot_1 = dot_00 + right * slope_0, dot_10 + right * slope_1
            grad_x = weight * (slope_0 + lower * (slope_1 - slope_0)) * scale_x
            grad_y = weight * (dot_1 - dot_0) * scale_y
            grad_point = tl.join(tl.where(inside, grad_x, 0.0), tl.where(inside, grad_y, 0.0))  # (BLOCK_Q, 2)
            grad_weight = dot_0 + lower * (dot_1 - dot_0)
            if REFERENCE_SIZE > 0:
                grad_weight = weight * (grad_weight - mean)
            pair = sample[:, None] * 2 + tl.arange(0, 2)[None, :]
            tl.store(grad_points_ptr + pair, grad_point, mask=is_query[:, None])
            tl.store(grad_weights_ptr + sample, grad_weight, mask=is_query)


@lru_cache(maxsize=4096)
def _level_table(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """(L, 3) height, width and first token of each level. The cache saves copies: one copy for each image size.

    Another thread makes the tensor. A tensor made in this thread while a CUDA graph warms up would be in the graph's
    memory pool. A replay overwrites that pool, but this table is kept.
    """
    table, start = [], 0
    for i in range(0, len(shapes), 2):
        height, width = shapes[i : i + 2]
        table.append((height, width, start))
        start += height * width
    with ThreadPoolExecutor(max_workers=1) as other:
        return other.submit(torch.tensor, table, dtype=torch.int32, device=device).result()


def _settings(value: Tensor, weights: Tensor, references: Tensor | None, lane_channels: int, num_warps: int) -> dict:
    """Arguments that both launches share.

    Args:
        lane_channels: number of channels of a query that a lane takes. A warp takes as many queries as fit.
    """
    _, tokens, heads, dim = value.shape
    _, queries, _, levels, points = weights.shape
    block_dim = triton.next_power_of_2(dim)
    return {
        "S": tokens,
        "Q": queries,
        "H": heads,
        "D": dim,
        "L": levels,
        "P": points,
        "REFERENCE_SIZE": 0 if references is None else references.shape[-1],
        "BLOCK_Q": num_warps * max(1, 32 * lane_channels // block_dim),
        "BLOCK_D": block_dim,
        "num_warps": num_warps,
        "enable_fp_fusion": True,  # explicit: Triton 3.9 warns that the default will change
    }


def _grid(batch: int, settings: dict) -> tuple[int]:
    """Number of programs, all on the first axis: other axes allow at most 65535."""
    return (batch * settings["H"] * triton.cdiv(settings["Q"], settings["BLOCK_Q"]),)


def forward(
    value: Tensor, shapes: Sequence[int], points: Tensor, weights: Tensor, references: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sample the L maps of `value` around each query and sum the samples with weights.

    Args:
        value: (B, S, H, D) float32, float16 or bfloat16.
        shapes: [height, width, height, width, ...] of the levels.
        points: (B, Q, H, L, P, 2)
        weights: (B, Q, H, L, P)
        references: None, (B, Q, L, 2) or (B, Q, L, 4). It selects the form, see the head of this file.
    Returns:
        (B, Q, H * D) in the dtype of `value`, and the log-sum-exp of the logits, (B, Q, H), or empty if unfused.
    """
    batch, queries, heads = weights.shape[:3]
    fused = references is not None
    out = value.new_empty(batch, queries, heads * value.shape[-1])
    lse = value.new_empty((batch, queries, heads) if fused else (0,), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    # A lane loads at most 16 bytes at once.
    settings = _settings(value, weights, references, lane_channels=16 // value.element_size(), num_warps=2)
    with torch.cuda.device_of(value):
        _forward_kernel[_grid(batch, settings)](
            value.contiguous(),
            _level_table(tuple(shapes), value.device),
            points.contiguous(),
            weights.contiguous(),
            references.contiguous() if fused else None,
            out,
            lse if fused else None,
            BLOCK_LP=triton.next_power_of_2(weights.shape[3] * weights.shape[4]),
            **settings,
        )
    return out, lse


def _fixed_point(grad_out: Tensor, weights: Tensor, lse: Tensor, fused: bool) -> tuple[Tensor, Tensor]:
    """The power of two that turns shares of grad_value into integers, and its inverse; both () on the device.

    Each sum must fit into 63 bits. In the worst case, all samples are in one cell. Each query then adds max|grad_out|
    times the sum of its |weights|, which is 1 after a softmax. Integers cannot be infinite. If a gradient may be
    infinite, the inverse is NaN, so loss scaling still detects the overflow.
    """
    _, queries, _, levels, points = weights.shape
    bound = grad_out.abs().amax().float()
    if fused:
        terms, finite = queries, bound.isfinite() & lse.isfinite().all()
    else:
        bound = bound * weights.abs().amax().float()
        terms, finite = queries * levels * points, bound.isfinite()
    # bound < 2 ** exponent, terms < 2 ** bit_length. The clamp keeps both results normal numbers.
    exponent = 62 - terms.bit_length() - torch.frexp(bound.nan_to_num()).exponent
    exponent = exponent.clamp(-126, 126)
    scale, inverse = ((127 + sign * exponent << 23).to(torch.int32).view(torch.float32) for sign in (1, -1))
    return scale, torch.where(finite, inverse, float("nan"))


def backward(
    grad_out: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    points: Tensor,
    weights: Tensor,
    references: Tensor | None,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `value`, `points` and `weights`, contiguous.

    Many samples add to one token of grad_value in any order, and the last bits of a float sum depend on the order.
    With `torch.use_deterministic_algorithms`, integers are added instead. This is slower, but gives equal bits every
    time.

    Args:
        out, lse: results of `forward`.
    """
    fused = references is not None
    points, weights = points.contiguous(), weights.contiguous()
    grad_points, grad_weights = torch.empty_like(points), torch.empty_like(weights)
    if weights.numel() == 0:
        return value.new_zeros(value.shape), grad_points, grad_weights
    scale, inverse = None, None
    if torch.are_deterministic_algorithms_enabled():
        scale, inverse = _fixed_point(grad_out, weights, lse, fused)
    grad_value = torch.zeros(value.shape, dtype=torch.float32 if scale is None else torch.int64, device=value.device)
    # A lane adds at most 16 bytes of float32 atomically. With one warp per program, the many sums need no barrier.
    settings = _settings(value, weights, references, lane_channels=4, num_warps=1)
    with torch.cuda.device_of(value):
        _backward_kernel[_grid(len(value), settings)](
            grad_out.contiguous(),
            value.contiguous(),
            _level_table(tuple(shapes), value.device),
            points,
            weights,
            references.contiguous() if fused else None,
            out.contiguous() if fused else None,
            lse.contiguous() if fused else None,
            scale,
            grad_value,
            grad_points,
            grad_weights,
            **settings,
        )
    if scale is not None:
        grad_value = grad_value * inverse  # int64 times a float32 scalar is float32
    return grad_value.to(value.dtype), grad_points, grad_weights
