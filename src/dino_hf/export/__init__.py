"""Export detectors as programs of `torch.export` and as ONNX files. Both are compared with the model before they are returned."""

from .graph import export_program
from .onnx_export import ExportReport, export_onnx

__all__ = ["ExportReport", "export_onnx", "export_program"]
