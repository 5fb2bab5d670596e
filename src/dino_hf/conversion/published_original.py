"""Published checkpoints of the original release. Nothing here imports torch."""

from .published_row import Published

_FOLDER = "https://drive.google.com/drive/folders/1qD5m1NmK0kjE5hh-G17XUX751WsEG-h_"


def _row(name: str, ap: float, backbone: str, num_levels: int, file: str, drive_id: str = "", **more) -> Published:
    """A file in the Google Drive folder of the release.

    Args:
        drive_id: id of the file, if known. Otherwise, the page shows the folder with all files.
    """
    page = f"https://drive.google.com/file/d/{drive_id}/view" if drive_id else _FOLDER
    return Published("original", name, ap, backbone, num_levels, file, page=page, num_labels=91, **more)


# The number in a file name is the epoch, counted from 0. It need not be the last epoch of the training.
PUBLISHED = (
    _row(
        *("r50_4scale_12ep", 49.0, "ResNet-50", 4, "checkpoint0011_4scale.pth", "1eeAHgu-fzp28PGdIjeLe-pzGPMG2r2G_"),
        mirrors=("https://huggingface.co/wdy413/DINO/resolve/main/checkpoint0011_4scale.pth",),
        sha256="0bcd6b0c33d60ed33461ce6f02ce5797a819c7c02eb7e15b76adfb6df307955a",
    ),
    _row("r50_4scale_24ep", 50.4, "ResNet-50", 4, "checkpoint0023_4scale.pth"),
    _row("r50_4scale_36ep", 50.9, "ResNet-50", 4, "checkpoint0033_4scale.pth", "1AwUn5EebmmLBo7njjW_Ng1q9zDrqkNbB"),
    _row(
        *("r50_5scale_12ep", 49.4, "ResNet-50", 5, "checkpoint0011_5scale.pth", "1DEoJzk8NL1hHQqTtDSkSHj5K6PRJ8bXq"),
        sha256="1ccc1b6b7139813e4d3bfbeecfcf88347ebc226829769a0bf16c4a114c275cc0",
    ),
    _row("r50_5scale_24ep", 51.3, "ResNet-50", 5, "checkpoint0022_5scale.pth"),
    _row("r50_5scale_36ep", 51.2, "ResNet-50", 5, "checkpoint0031_5scale.pth", "1Slrekf60spGumTi2wh49Aww5iEmgXZEg"),
    _row("swin_l_4scale_12ep", 56.8, "Swin-L 384", 4, "checkpoint0011_4scale_swin.pth"),
    _row(
        *("swin_l_4scale_36ep", 58.0, "Swin-L 384", 4, "checkpoint0029_4scale_swin.pth"),
        "1CrzFP0RycSC24KKmF5k0libLRJgpX9x0",
    ),
    _row("swin_l_5scale_12ep", 57.3, "Swin-L 384", 5, "checkpoint0011_5scale_swin.pth"),
    _row(
        *("swin_l_5scale_36ep", 58.5, "Swin-L 384", 5, "checkpoint0027_5scale_swin.pth"),
        "14h4UCi-HsDL01ZQRbpV47dzMST_py_vM",
        sha256="17ddce1592816a0c63a2edc94d4a0877ffeb086f397a6657e151c703a4c850b5",
        size=2_615_534_683,
    ),
)
