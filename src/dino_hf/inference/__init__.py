"""Detections of any detector in images, folders, addresses, videos."""

from .pictures import draw_detections
from .predict import Prediction, predict
from .predictor import Detections, Predictor

__all__ = ["Detections", "Prediction", "Predictor", "draw_detections", "predict"]
