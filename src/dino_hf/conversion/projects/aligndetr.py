"""Align-DETR: https://github.com/FelixCaae/AlignDETR, also a project of detrex"""

from .detrex import Detrex


class AlignDetr(Detrex):
    """Align-DETR computes detrex's DINO, and trains it with another loss. Its files have the same tensors as detrex's files.

    So its files are recognised as files of detrex, except the published ones. All its models have the same position settings.
    """

    name = "aligndetr"
    defaults = Detrex.defaults | {"class_loss": "align_detr", "queries_per_box": 2}
    has_fixed_positions = True
