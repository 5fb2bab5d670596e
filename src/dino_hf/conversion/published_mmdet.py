"""Published checkpoints of mmdetection. Nothing here imports torch."""

from pathlib import PurePosixPath

from .published_row import Published

_FOLDER = "https://download.openmmlab.com/mmdetection/v3.0/dino/"
_OTHER_HOST = "https://github.com/RistoranteRist/mmlab-weights/releases/download/dino-swinl/"


def _row(name: str, ap: float, backbone: str, num_levels: int, address: str, sha256: str = "", **more) -> Published:
    """A file of mmdetection. Its name ends with the first 8 digits of its SHA-256.

    Args:
        sha256: all digits, if known.
    """
    path = PurePosixPath(address)
    digits = sha256 or path.stem.rsplit("-", 1)[1]
    return Published("mmdet", name, ap, backbone, num_levels, path.name, address, sha256=digits, **more)


_R50, _IMPROVED = "dino-4scale_r50_8xb2-12e_coco", "dino-4scale_r50_improved_8xb2-12e_coco"
_SWIN_12, _SWIN_36 = "dino-5scale_swin-l_8xb2-12e_coco", "dino-5scale_swin-l_8xb2-36e_coco"

PUBLISHED = (
    _row(*(_R50, 49.0, "ResNet-50", 4), f"{_FOLDER}{_R50}/{_R50}_20221202_182705-55b2bba2.pth"),
    _row(
        *(_IMPROVED, 50.1, "ResNet-50", 4),
        f"{_FOLDER}{_IMPROVED}/{_IMPROVED}_20230818_162607-6f47a913.pth",
        "6f47a9136abcba7b6293a9f1bf4870e4c604276d0d11c4c84ceabfda9ea14245",
        settings={
            "position_temperature": 10000.0,
            "position_offset": -0.5,
            "num_denoising": 300,
            "cls_loss_coefficient": 2.0,
            "num_frozen_backbone_stages": 0,
        },
    ),
    _row(*(_SWIN_12, 57.2, "Swin-L 384", 5), f"{_FOLDER}{_SWIN_12}/{_SWIN_12}_20230228_072924-a654145f.pth"),
    _row(*(_SWIN_36, 58.4, "Swin-L 384", 5), f"{_OTHER_HOST}{_SWIN_36}-5486e051.pth", license=None),
)
