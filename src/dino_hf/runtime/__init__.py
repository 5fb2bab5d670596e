"""Additions of the installed package to a model: kernels, pipeline, model card. The model works without them."""
