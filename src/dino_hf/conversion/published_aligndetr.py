"""Published checkpoints of Align-DETR. Nothing here imports torch."""

from .published_row import Published


def _row(epochs: int, ap: float, drive_id: str) -> Published:
    """A file in Google Drive. Its name is not published; `file` is the name of its configuration."""
    config = f"aligndetr_k=2_r50_4scale_{epochs}ep"
    return Published(
        *("aligndetr", f"r50_4scale_{epochs}ep", ap, "ResNet-50", 4, f"{config}.pth"),
        page=f"https://drive.google.com/file/d/{drive_id}/view",
        aliases=(config, f"AlignDETR-R50-{epochs}ep"),
        other_files=(f"AlignDETR-R50-{epochs}ep.pth",),
    )


PUBLISHED = (
    _row(12, 50.3, "12xSxD_Z9KI8bejSlO1td1XcZ-Ns00rTi"),
    _row(24, 51.4, "1zQYe78fDdCmK3nwbAWYLvGCdQCFsTqoX"),
)
