"""Run any detector of transformers on images, folders, addresses, videos and cameras."""

from .pictures import draw_detections
from .predict import Prediction, predict
from .predictor import Detections, Predictor

__all__ = ["Detections", "Prediction", "Predictor", "draw_detections", "predict"]
