"""Checkpoints of the original release at toy size: its names, written out here without the tables of the conversion."""

import argparse

import torch

WIDTH, FFN, CLASSES, QUERIES, LAYERS = 64, 48, 6, 7, 2
WIDTHS = {"resnet": [32, 48, 64, 80], "swin": [24, 48, 96, 192], "convnext": [16, 24, 32, 40]}


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name, width):
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def resnet_shapes(widths):
    def batch_norm(name, width):
        return norm(name, width) | {f"{name}.running_mean": (width,), f"{name}.running_var": (width,)}

    shapes, width = {"conv1.weight": (64, 3, 7, 7)} | batch_norm("bn1", 64), 64
    for stage, out in enumerate(widths, start=1):
        for block in range(2 if stage == 1 else 1):
            name, inner = f"layer{stage}.{block}", out // 4
            for part, (outputs, inputs, size) in enumerate([(inner, width, 1), (inner, inner, 3), (out, inner, 1)], 1):
                shapes[f"{name}.conv{part}.weight"] = (outputs, inputs, size, size)
                shapes |= batch_norm(f"{name}.bn{part}", outputs)
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (out, width, 1, 1)
                shapes |= batch_norm(f"{name}.downsample.1", out)
            width = out
    return {f"body.{name}": shape for name, shape in shapes.items()}


def swin_shapes(widths, window=3):
    shapes = {"patch_embed.proj.weight": (widths[0], 3, 4, 4), "patch_embed.proj.bias": (widths[0],)}
    shapes |= norm("patch_embed.norm", widths[0])
    for stage, width in enumerate(widths):
        for block in range(2):
            name = f"layers.{stage}.blocks.{block}"
            shapes |= norm(f"{name}.norm1", width) | norm(f"{name}.norm2", width)
            shapes[f"{name}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, stage + 1)
            shapes[f"{name}.attn.relative_position_index"] = (window**2, window**2)
            shapes |= linear(f"{name}.attn.qkv", 3 * width, width) | linear(f"{name}.attn.proj", width, width)
            shapes |= linear(f"{name}.mlp.fc1", 4 * width, width) | linear(f"{name}.mlp.fc2", width, 4 * width)
        if stage < 3:
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
            shapes |= norm(f"layers.{stage}.downsample.norm", 4 * width)
    return shapes | {key: shape for i in (1, 2, 3) for key, shape in norm(f"norm{i}", widths[i]).items()}


def convnext_shapes(widths):
    shapes, width = {}, 3
    for stage, out in enumerate(widths):
        if stage == 0:
            shapes |= {"downsample_layers.0.0.weight": (out, 3, 4, 4), "downsample_layers.0.0.bias": (out,)}
            shapes |= norm("downsample_layers.0.1", out)
        else:
            shapes |= norm(f"downsample_layers.{stage}.0", width)
            shapes |= {f"downsample_layers.{stage}.1.weight": (out, width, 2, 2)}
            shapes |= {f"downsample_layers.{stage}.1.bias": (out,)}
        for block in range(2 if stage == 1 else 1):
            name = f"stages.{stage}.{block}"
            shapes |= {f"{name}.dwconv.weight": (out, 1, 7, 7), f"{name}.dwconv.bias": (out,), f"{name}.gamma": (out,)}
            shapes |= norm(f"{name}.norm", out)
            shapes |= linear(f"{name}.pwconv1", 4 * out, out) | linear(f"{name}.pwconv2", out, 4 * out)
        shapes |= norm(f"norm{stage}", out)  # also of the stage that is not used
        width = out
    return shapes


def original_tensors(backbone="resnet"):
    """A small model under the names of the release, random."""
    widths = WIDTHS[backbone]
    shapes = {"transformer.level_embed": (4, WIDTH), "label_enc.weight": (CLASSES + 1, WIDTH)}
    shapes["transformer.tgt_embed.weight"] = (QUERIES, WIDTH)
    shapes |= linear("transformer.enc_output", WIDTH, WIDTH) | norm("transformer.enc_output_norm", WIDTH)
    shapes |= linear("transformer.enc_out_class_embed", CLASSES, WIDTH) | norm("transformer.decoder.norm", WIDTH)
    shapes |= linear("transformer.decoder.ref_point_head.layers.0", WIDTH, 2 * WIDTH)
    shapes |= linear("transformer.decoder.ref_point_head.layers.1", WIDTH, WIDTH)
    for part in range(3):
        shapes |= linear(f"transformer.enc_out_bbox_embed.layers.{part}", 4 if part == 2 else WIDTH, WIDTH)
        shapes |= linear(f"bbox_embed.0.layers.{part}", 4 if part == 2 else WIDTH, WIDTH)
    shapes |= linear("class_embed.0", CLASSES, WIDTH)
    for side, attention, points in (("encoder", "self_attn", 2), ("decoder", "cross_attn", 3)):
        for layer in range(LAYERS):
            name = f"transformer.{side}.layers.{layer}"
            shapes |= linear(f"{name}.linear1", FFN, WIDTH) | linear(f"{name}.linear2", WIDTH, FFN)
            for part in range(2 if side == "encoder" else 3):
                shapes |= norm(f"{name}.norm{part + 1}", WIDTH)
            shapes |= linear(f"{name}.{attention}.sampling_offsets", 4 * 4 * points * 2, WIDTH)
            shapes |= linear(f"{name}.{attention}.attention_weights", 4 * 4 * points, WIDTH)
            shapes |= linear(f"{name}.{attention}.value_proj", WIDTH, WIDTH)
            shapes |= linear(f"{name}.{attention}.output_proj", WIDTH, WIDTH)
            if side == "decoder":
                shapes |= {f"{name}.self_attn.in_proj_weight": (3 * WIDTH, WIDTH)}
                shapes |= {f"{name}.self_attn.in_proj_bias": (3 * WIDTH,)}
                shapes |= linear(f"{name}.self_attn.out_proj", WIDTH, WIDTH)
    for level in range(4):
        inputs, size = (widths[level + 1], 1) if level < 3 else (widths[3], 3)
        shapes |= {f"input_proj.{level}.0.weight": (WIDTH, inputs, size, size), f"input_proj.{level}.0.bias": (WIDTH,)}
        shapes |= norm(f"input_proj.{level}.1", WIDTH)
    own = {"resnet": resnet_shapes, "swin": swin_shapes, "convnext": convnext_shapes}[backbone](widths)
    shapes |= {f"backbone.0.{name}": shape for name, shape in own.items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}
    tensors |= {key: value.abs() + 0.5 for key, value in tensors.items() if key.endswith("running_var")}
    for key in [key for key in tensors if key.startswith(("class_embed.0", "bbox_embed.0"))]:
        for layer in range(LAYERS):
            copy = key.replace("embed.0", f"embed.{layer}", 1)
            tensors[copy] = tensors[f"transformer.decoder.{copy}"] = tensors[key]
    return tensors


def settings(**changes):
    values = {"pe_temperatureH": 20, "pe_temperatureW": 20, "nheads": 4, "enc_n_points": 2, "dec_n_points": 3}
    return argparse.Namespace(**values | {"dn_number": 100, "dn_box_noise_scale": 1.0} | changes)
