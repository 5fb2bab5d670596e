"""Published checkpoints of Co-DETR (Co-DINO). Nothing here imports torch."""

from pathlib import PurePosixPath

from .published_row import Published

_MMDET = "https://download.openmmlab.com/mmdetection/v3.0/codetr/"
_DRIVE = "https://drive.google.com/drive/folders/1nAXOkzqrEgz-YnXxIEs4d5j9li_kmrnv"
_HUB = "https://huggingface.co/zongzhuofan/"
_R50, _SWIN, _VIT = "ResNet-50", "Swin-L 384", "EVA-02 ViT-L"
_SOFT_NMS = {"method": "soft", "iou_threshold": 0.8}
_NOISE = {"num_denoising": 500, "box_noise_scale": 0.4}
_LVIS = {"num_labels": 1203, "ap_data": "LVIS v1 val"}
_OBJECTS365 = {"num_labels": 365, "ap_data": "Objects365"}


def _canvas(side: int) -> dict:
    return {"size": {"shortest_edge": side, "longest_edge": side}, "canvas_value": 114}


def _row(name: str, ap: float | None, backbone: str, processor: dict, address: str = "", **more) -> Published:
    """A file of Sense-X, which trained all of them but one.

    Args:
        name: of Sense-X's configuration. The file in Sense-X's Google Drive folder has this name.
        processor: settings of the image processor besides soft NMS.
        address: of mmdetection's copy, below its folder. Its name ends with the first 8 digits of its SHA-256. Only its
            container, and the names in it, may differ from Sense-X's file. Empty: only the folder has the file.
    """
    file = PurePosixPath(address).name
    return Published(
        *("codetr", name, ap, backbone, 5, file or f"{name}.pth", f"{_MMDET}{address}" if file else ""),
        page="" if file else _DRIVE,
        sha256=file.removesuffix(".pth")[-8:],
        processor={"nms": _SOFT_NMS} | processor,
        **{"license": "mit", "other_files": (f"{name}.pth",) if file else ()} | more,
    )


def _with_vit(name: str, ap: float | None, **more) -> Published:
    file = "pytorch_model.pth"
    return Published(
        *("codetr", name, ap, _VIT, 5, f"{name}/{file}", f"{_HUB}{name}/resolve/main/{file}"),
        num_queries=1500,
        processor={"nms": _SOFT_NMS},
        **more,
    )


PUBLISHED = (
    _row(
        *("co_dino_5scale_r50_lsj_8xb2_1x_coco", 52.0, _R50, _canvas(1024) | {"nms": _SOFT_NMS | {"candidates": 300}}),
        "co_dino_5scale_r50_lsj_8xb2_1x_coco/co_dino_5scale_r50_lsj_8xb2_1x_coco-69a72d67.pth",
        license="apache-2.0",  # trained by mmdetection
    ),
    _row(
        *("co_dino_5scale_r50_1x_coco", 52.1, _R50, {}, "co_dino_5scale_r50_1x_coco-7481f903.pth"),
        aliases=("co_dino_5scale_r50_8xb2_1x_coco",),
    ),
    _row("co_dino_5scale_lsj_r50_1x_coco", 52.1, _R50, _canvas(1024)),
    _row("co_dino_5scale_9encoder_lsj_r50_1x_coco", 52.6, _R50, _canvas(1024), encoder_layers=9),
    _row(
        *("co_dino_5scale_lsj_r50_3x_coco", 54.8, _R50, _canvas(1024), "co_dino_5scale_lsj_r50_3x_coco-fe5a6829.pth"),
        aliases=("co_dino_5scale_r50_lsj_8xb2_3x_coco",),
    ),
    _row("co_dino_5scale_9encoder_lsj_r50_3x_coco", 55.4, _R50, _canvas(1024), encoder_layers=9),
    _row(
        *("co_dino_5scale_swin_large_1x_coco", 58.9, _SWIN, {}, "co_dino_5scale_swin_large_1x_coco-27c13da4.pth"),
        aliases=("co_dino_5scale_swin_l_16xb1_1x_coco",),
    ),
    _row("co_dino_5scale_swin_large_2x_coco", 59.8, _SWIN, {}),
    _row(
        *("co_dino_5scale_swin_large_3x_coco", 60.0, _SWIN, {}, "co_dino_5scale_swin_large_3x_coco-d7a6d8af.pth"),
        aliases=("co_dino_5scale_swin_l_16xb1_3x_coco",),
    ),
    _row(
        *("co_dino_5scale_lsj_swin_large_1x_coco", 59.3, _SWIN, _canvas(1280)),
        "co_dino_5scale_lsj_swin_large_1x_coco-3af73af2.pth",
        aliases=("co_dino_5scale_swin_l_lsj_16xb1_1x_coco",),
        note="mmdetection's list also links this file for the model of 60.7 AP, by mistake. It is the model of 59.3 AP.",
    ),
    _row("co_dino_5scale_lsj_swin_large_2x_coco", 60.4, _SWIN, _canvas(1280)),
    _row(
        *("co_dino_5scale_lsj_swin_large_3x_coco", 60.7, _SWIN, _canvas(1280)),
        aliases=("co_dino_5scale_swin_l_lsj_16xb1_3x_coco",),
        note="Only the Google Drive folder has this file. mmdetection's link for it gives the file of 59.3 AP.",
    ),
    _row(
        *("co_dino_5scale_swin_large_16e_o365tococo", 64.1, _SWIN),
        {"size": {"shortest_edge": 1280, "longest_edge": 2048}},
        "co_dino_5scale_swin_large_16e_o365tococo-614254c9.pth",
        aliases=("co_dino_5scale_swin_l_16xb1_16e_o365tococo",),
        settings=_NOISE,
    ),
    _row(
        *("co_dino_5scale_swin_large_22e_o365", None, _SWIN, {"size": {"shortest_edge": 1280, "longest_edge": 2048}}),
        "co_dino_5scale_swin_large_22e_o365-0a33e247.pth",
        settings=_NOISE,
        note="It detects the 365 classes of Objects365. The model of 64.1 AP was trained from it.",
        **_OBJECTS365,
    ),
    _row("co_dino_5scale_lsj_swin_large_3x_lvis", 56.9, _SWIN, _canvas(1280), **_LVIS),
    _row(
        *("co_dino_5scale_swin_large_16e_o365tolvis", 64.5, _SWIN, _canvas(1536)),
        aliases=("co_dino_5scale_lsj_swin_large_16e_o365tolvis",),
        other_files=("co_dino_5scale_lsj_swin_large_16e_o365tolvis.pth",),
        settings=_NOISE,
        **_LVIS,
    ),
    _with_vit("co-detr-vit-large-objects365", None, **_OBJECTS365),
    _with_vit("co-detr-vit-large-coco", 65.9),
    _with_vit("co-detr-vit-large-lvis", 68.0, **_LVIS),
)
