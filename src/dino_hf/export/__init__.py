"""Detectors as graphs of their own: programs of `torch.export`, and ONNX files that are compared with the model before they are
given out."""

from .graph import export_program
from .onnx_export import ExportReport, export_onnx

__all__ = ["ExportReport", "export_onnx", "export_program"]
