"""The folder that `evaluate.load(dino_hf.evaluation.COCO_METRIC)` loads. It looks for a script with the folder's name."""
