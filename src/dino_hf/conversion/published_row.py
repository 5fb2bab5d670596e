"""`Published`: the facts about a published checkpoint file. Nothing here imports torch."""

import re
from typing import Any, NamedTuple

# Backbones of published checkpoints: model type, depths of the stages, width of the first stage, attention
# window or first window of a FocalNet.
BACKBONES: dict[str, tuple[str, list[int], int, int | None]] = {
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
    "FocalNet-L fl3": ("dino_detr_focalnet", [2, 2, 18, 2], 192, 5),
    "FocalNet-L fl4": ("dino_detr_focalnet", [2, 2, 18, 2], 192, 3),
    "ViTDet-B": ("dino_detr_vit_pyramid", [12], 768, 14),
    "ViTDet-L": ("dino_detr_vit_pyramid", [24], 1024, 14),
    "InternImage-T": ("dino_detr_internimage", [4, 4, 18, 4], 64, None),
    "InternImage-S": ("dino_detr_internimage", [4, 4, 21, 4], 80, None),
    "InternImage-B": ("dino_detr_internimage", [4, 4, 21, 4], 112, None),
    "InternImage-L": ("dino_detr_internimage", [5, 5, 22, 5], 160, None),
}

COCO = "COCO val2017"

# What browsers, file managers, downloaders and Google Drive add to the name of a file.
_ADDED = re.compile(r"(\s*\(\d+\)|[\s_-]+copy(\s*\(?\d+\)?)?|-00\d)$")


def plain_stem(name: str) -> str:
    """A file name in lower case, without its suffix and without the marks of copies, such as " (1)"."""
    stem = re.sub(r"\.(pth|pt|bin|ckpt|safetensors)(\.\d+)?$", "", name.strip().lower())
    while (shorter := _ADDED.sub("", stem)) != stem:
        stem = shorter
    return stem


def ap_text(ap: float | None, data_set: str) -> str:
    """A published AP, with its data set if it is not COCO."""
    if ap is None:
        return "none"
    return f"{ap:.1f}" + ("" if data_set == COCO else f" {data_set.split()[0]}")


class Published(NamedTuple):
    """A published checkpoint file.

    To download the file, try `addresses` in order, and check it by `sha256` and `size`. If there are no addresses, the user
    must download it from `page` with a browser.

    Attributes:
        project: name of the project.
        name: name of the model there.
        ap: AP as the project reports it, on the data in `ap_data`; None if it reports none. We did not measure it.
        backbone: key of BACKBONES, or the name of an unsupported backbone.
        num_levels: feature levels.
        file: name of the file.
        address: address from which the project gives the file. Empty if the file is only on a web page.
        page: web page where the user can download the file with a browser. Empty if the file has an address.
        mirrors: further addresses of the same file. They belong to other owners, so a row with mirrors has a `sha256`.
        sha256: the first hexadecimal digits of the file's SHA-256, in lower case: 8 or all 64. Empty if unknown.
        size: size of the file in bytes; None if unknown.
        settings: fields of the configuration that differ from the project's defaults.
        is_averaged: whether `ap` was measured with the averaged weights. The file may have other weights too.
        aliases: other names of the model.
        license: license of the weights; None if the host does not state it.
        num_labels, num_queries: sizes of the heads.
        encoder_layers: layers of the encoder.
        processor: settings of the image processor that differ from its defaults.
        ap_data: data set of `ap`.
        other_files: names of other files with the same weights, whose SHA-256 is unknown.
        note: what a user should know, as a sentence.
    """

    project: str
    name: str
    ap: float | None
    backbone: str
    num_levels: int
    file: str
    address: str = ""
    page: str = ""
    mirrors: tuple[str, ...] = ()
    sha256: str = ""
    size: int | None = None
    settings: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    is_averaged: bool = False
    aliases: tuple[str, ...] = ()
    license: str | None = "apache-2.0"
    num_labels: int = 80
    num_queries: int = 900
    encoder_layers: int = 6
    processor: dict[str, Any] = {}  # noqa: RUF012  (never changed)
    ap_data: str = COCO
    other_files: tuple[str, ...] = ()
    note: str = ""

    @property
    def title(self) -> str:
        """PROJECT/NAME: the value of --published, and a name of a model."""
        return f"{self.project}/{self.name}"

    @property
    def titles(self) -> tuple[str, ...]:
        """`title`, and the same with each alias."""
        return tuple(f"{self.project}/{name}" for name in (self.name, *self.aliases))

    @property
    def is_supported(self) -> bool:
        """Whether the converter supports the backbone."""
        return self.backbone in BACKBONES

    @property
    def addresses(self) -> tuple[str, ...]:
        """Addresses of the file, in the order to try them."""
        return (*((self.address,) if self.address else ()), *self.mirrors)

    @property
    def url(self) -> str:
        """Where the project publishes the file: its address, or else the web page."""
        return self.address or self.page

    def sha256_applies(self, file_name: str) -> bool:
        """Whether a file of this name must have `sha256`. `other_files` have the same weights, but another SHA-256."""
        return not self.other_files or plain_stem(file_name) == plain_stem(self.file)

    @property
    def post_processing(self) -> str:
        """How image size, canvas and NMS differ from the defaults, such as "soft NMS 0.8, canvas 1024"; "plain" if they do not."""
        nms, size = self.processor.get("nms"), self.processor.get("size")
        parts = [f"{nms['method']} NMS {nms['iou_threshold']:g}"] if nms else []
        if "canvas_value" in self.processor:
            parts.append(f"canvas {size['longest_edge']}")
        elif size:
            parts.append(f"images {size['shortest_edge']} to {size['longest_edge']}")
        return ", ".join(parts) or "plain"

    def architecture(self) -> dict:
        """Properties that a file must have to be this checkpoint."""
        kind, depths, width, window = BACKBONES[self.backbone]
        backbone = {"backbone": kind, "depths": depths, "width": width, "window": window}
        sizes = {"levels": self.num_levels, "encoder layers": self.encoder_layers}
        sizes |= {"queries": self.num_queries, "classes": self.num_labels}
        return {"project": self.project, **backbone, **sizes}
