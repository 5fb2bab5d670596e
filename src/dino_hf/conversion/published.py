"""The published checkpoints, and what their files do not say.

AP is that of COCO val2017 as the projects publish it; none of it was measured here.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """One file. `backbone` is a key of BACKBONES, or the name of one that cannot be expressed."""

    project: str
    name: str
    ap: float
    backbone: str
    num_levels: int
    file: str
    folder: str  # where the file is
    settings: dict = {}  # noqa: RUF012  (never changed) fields of the configuration that differ from the project's defaults

    @property
    def title(self) -> str:
        return f"{self.project}/{self.name}"

    @property
    def license(self) -> str | None:
        """Of the project that published it; what others host, they say nothing of."""
        return None if self.folder == _MMLAB_WEIGHTS else "apache-2.0"

    def architecture(self) -> dict:
        """What a file must have to be this one."""
        kind, depths, width, window = BACKBONES[self.backbone]
        backbone = {"backbone": kind, "depths": depths, "width": width, "window": window}
        sizes = {"levels": self.num_levels, "queries": 900, "classes": 91 if self.project == "original" else 80}
        return {"project": self.project, **backbone, **sizes}

    @property
    def url(self) -> str:
        return self.folder if "drive.google" in self.folder else self.folder + self.file


# Depths of the four stages, width of the first, and side of the attention window.
BACKBONES = {
    "ResNet-50": ("resnet", [3, 4, 6, 3], 256, None),
    "ResNet-101": ("resnet", [3, 4, 23, 3], 256, None),
    "Swin-T 224": ("swin", [2, 2, 6, 2], 96, 7),
    "Swin-S 224": ("swin", [2, 2, 18, 2], 96, 7),
    "Swin-B 384": ("swin", [2, 2, 18, 2], 128, 12),
    "Swin-L 224": ("swin", [2, 2, 18, 2], 192, 7),
    "Swin-L 384": ("swin", [2, 2, 18, 2], 192, 12),
    "ConvNeXt-T": ("convnext", [3, 3, 9, 3], 96, None),
    "ConvNeXt-S": ("convnext", [3, 3, 27, 3], 96, None),
    "ConvNeXt-B": ("convnext", [3, 3, 27, 3], 128, None),
    "ConvNeXt-L": ("convnext", [3, 3, 27, 3], 192, None),
}

_DRIVE = "https://drive.google.com/drive/folders/1qD5m1NmK0kjE5hh-G17XUX751WsEG-h_"
_DETREX = "https://github.com/IDEA-Research/detrex-storage/releases/download/"
_MMDET = "https://download.openmmlab.com/mmdetection/v3.0/dino/"
_MMLAB_WEIGHTS = "https://github.com/RistoranteRist/mmlab-weights/releases/download/dino-swinl/"


def _original(name: str, ap: float, backbone: str, num_levels: int, file: str) -> Published:
    return Published("original", name, ap, backbone, num_levels, file, _DRIVE)


def _detrex(version: str, file: str, ap: float, backbone: str, num_levels: int = 4, **settings) -> Published:
    name = file.removesuffix(".pth")
    return Published("detrex", name, ap, backbone, num_levels, file, f"{_DETREX}{version}/", settings)


PUBLISHED = [
    _original("r50_4scale_12ep", 49.0, "ResNet-50", 4, "checkpoint0011_4scale.pth"),
    _original("r50_4scale_24ep", 50.4, "ResNet-50", 4, "checkpoint0023_4scale.pth"),
    _original("r50_4scale_36ep", 50.9, "ResNet-50", 4, "checkpoint0035_4scale.pth"),
    _original("r50_5scale_12ep", 49.4, "ResNet-50", 5, "checkpoint0011_5scale.pth"),
    _original("r50_5scale_24ep", 51.3, "ResNet-50", 5, "checkpoint0023_5scale.pth"),
    _original("r50_5scale_36ep", 51.2, "ResNet-50", 5, "checkpoint0035_5scale.pth"),
    _original("swin_l_4scale_12ep", 56.8, "Swin-L 384", 4, "checkpoint0011_4scale_swin.pth"),
    _original("swin_l_4scale_36ep", 58.0, "Swin-L 384", 4, "checkpoint0035_4scale_swin.pth"),
    _original("swin_l_5scale_12ep", 57.3, "Swin-L 384", 5, "checkpoint0011_5scale_swin.pth"),
    _original("swin_l_5scale_36ep", 58.5, "Swin-L 384", 5, "checkpoint0035_5scale_swin.pth"),
    _detrex("v0.2.0", "dino_r50_4scale_12ep_49_2AP.pth", 49.2, "ResNet-50"),
    # detrex kept a class weight of 1 for denoising here; dino_hf has one for both
    _detrex(
        "v0.4.0",
        "dino_r50_4scale_12ep_backbone_2e-5_class_weight_2.0.pth",
        49.8,
        "ResNet-50",
        cls_loss_coefficient=2.0,
    ),
    _detrex(
        "v0.4.0",
        "dino_r50_4scale_12ep_backbone_2e-5_class_weight_2.0_300dn.pth",
        50.0,
        "ResNet-50",
        cls_loss_coefficient=2.0,
        num_denoising=300,
    ),
    _detrex("v0.1.1", "dino_r50_4scale_24ep.pth", 50.6, "ResNet-50", position_temperature=20.0, position_offset=0.0),
    _detrex("v0.2.1", "dino_r50_5scale_12ep.pth", 49.6, "ResNet-50", 5),
    _detrex("v0.1.1", "dino_r101_4scale_12ep.pth", 50.0, "ResNet-101"),
    _detrex("v0.1.1", "dino_swin_tiny_224_4scale_12ep.pth", 51.3, "Swin-T 224"),
    _detrex("v0.1.1", "dino_swin_small_224_4scale_12ep.pth", 53.0, "Swin-S 224"),
    _detrex("v0.1.1", "dino_swin_base_384_4scale_12ep.pth", 55.8, "Swin-B 384"),
    _detrex("v0.1.1", "dino_swin_large_224_4scale_12ep.pth", 56.9, "Swin-L 224"),
    _detrex("v0.1.1", "dino_swin_large_4scale_12ep.pth", 56.9, "Swin-L 384"),
    _detrex("v0.2.1", "dino_swin_large_384_5scale_12ep.pth", 57.5, "Swin-L 384", 5),
    _detrex("v0.2.0", "dino_swin_large_384_4scale_36ep.pth", 58.1, "Swin-L 384"),
    _detrex("v0.2.1", "dino_swin_large_384_5scale_36ep.pth", 58.5, "Swin-L 384", 5),
    _detrex("v0.4.0", "dino_convnext_tiny_384_4scale_12ep.pth", 52.4, "ConvNeXt-T"),
    _detrex("v0.4.0", "dino_convnext_small_384_4scale_12ep.pth", 54.2, "ConvNeXt-S"),
    _detrex("v0.4.0", "dino_convnext_base_384_4scale_12ep.pth", 55.1, "ConvNeXt-B"),
    _detrex("v0.4.0", "dino_convnext_large_384_4scale_12ep.pth", 55.5, "ConvNeXt-L"),
    _detrex("v0.2.1", "dino_focal_large_lrf_384_4scale_12ep.pth", 57.5, "FocalNet-L"),
    _detrex("v0.2.1", "dino_focal_large_lrf_384_fl4_4scale_12ep.pth", 58.0, "FocalNet-L"),
    _detrex("v0.4.0", "dino_focal_large_3level_4scale_36ep.pth", 58.3, "FocalNet-L"),
    _detrex("v0.2.1", "dino_focalnet_large_lrf_384_fl4_5scale_12ep.pth", 58.5, "FocalNet-L", 5),
    _detrex("v0.2.1", "dino_vitdet_4scale_12ep.pth", 50.2, "ViTDet-B"),
    _detrex("v0.2.1", "dino_vitdet_base_4scale_50ep.pth", 55.0, "ViTDet-B"),
    _detrex("v0.2.1", "dino_vitdet_large_4scale_12ep.pth", 52.9, "ViTDet-L"),
    _detrex("v0.2.1", "dino_vitdet_large_4scale_50ep.pth", 57.5, "ViTDet-L"),
    _detrex("v0.4.0", "dino_internimage_tiny_4scale_12ep.pth", 52.3, "InternImage-T"),
    _detrex("v0.4.0", "dino_internimage_small_4scale_12ep.pth", 53.6, "InternImage-S"),
    _detrex("v0.4.0", "dino_internimage_base_4scale_12ep.pth", 54.7, "InternImage-B"),
    _detrex("v0.4.0", "dino_internimage_large_4scale_12ep.pth", 57.0, "InternImage-L"),
    Published(
        *("mmdet", "dino-4scale_r50_8xb2-12e_coco", 49.0, "ResNet-50", 4),
        "dino-4scale_r50_8xb2-12e_coco_20221202_182705-55b2bba2.pth",
        _MMDET + "dino-4scale_r50_8xb2-12e_coco/",
    ),
    Published(
        *("mmdet", "dino-4scale_r50_improved_8xb2-12e_coco", 50.1, "ResNet-50", 4),
        "dino-4scale_r50_improved_8xb2-12e_coco_20230818_162607-6f47a913.pth",
        _MMDET + "dino-4scale_r50_improved_8xb2-12e_coco/",
        {
            "position_temperature": 10000.0,
            "position_offset": -0.5,
            "num_denoising": 300,
            "cls_loss_coefficient": 2.0,
            "num_frozen_backbone_stages": 0,
        },
    ),
    Published(
        *("mmdet", "dino-5scale_swin-l_8xb2-12e_coco", 57.2, "Swin-L 384", 5),
        "dino-5scale_swin-l_8xb2-12e_coco_20230228_072924-a654145f.pth",
        _MMDET + "dino-5scale_swin-l_8xb2-12e_coco/",
    ),
    Published(
        *("mmdet", "dino-5scale_swin-l_8xb2-36e_coco", 58.4, "Swin-L 384", 5),
        "dino-5scale_swin-l_8xb2-36e_coco-5486e051.pth",
        _MMLAB_WEIGHTS,
    ),
]


def command(row: Published) -> str:
    """What downloads, where a file has an address of its own, converts and verifies it."""
    name = row.name.removeprefix("dino-").removeprefix("dino_").replace("_", "-")
    output = f"dino-{name}" if row.project == "original" else f"dino-{row.project}-{name}"
    lines = [] if row.url == _DRIVE else [f"curl -LO {row.url} &&"]
    lines += [f"python convert_scripts/convert_checkpoint.py --checkpoint {row.file}", f"--published {row.title}"]
    return " \\\n    ".join([*lines, f"--output {output} --verify"])


def table() -> str:
    """The part of docs/checkpoints.md that lists the files: a row of a table and a command for each."""
    lines = []
    for project in ("original", "detrex", "mmdet"):
        rows = [row for row in PUBLISHED if row.project == project]
        lines += [
            f"### {project}",
            "",
            "| name | backbone | scales | published AP | file |",
            "| --- | --- | --- | --- | --- |",
        ]
        for row in rows:
            note = "" if row.backbone in BACKBONES else ", [not supported](#not-supported)"
            lines += [f"| {row.name} | {row.backbone}{note} | {row.num_levels} | {row.ap} | [{row.file}]({row.url}) |"]
        lines += [""]
        for row in rows:
            if row.backbone in BACKBONES:
                lines += [f"{row.name}:", "", "```bash", command(row), "```", ""]
    return "\n".join(lines) + "\n"
