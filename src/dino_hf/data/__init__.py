"""Read and check data sets of any format."""

from .file_names import canonical_split
from .load import DetectionData, load_data
from .raw import Problem, RawDataset, RawSplit, open_image
from .recognise import read_raw
from .rows import CocoData
from .tiled_data import cut_into_tiles

__all__ = [
    "CocoData",
    "DetectionData",
    "Problem",
    "RawDataset",
    "RawSplit",
    "canonical_split",
    "cut_into_tiles",
    "load_data",
    "open_image",
    "read_raw",
]
