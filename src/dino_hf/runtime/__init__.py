"""Kernel loading and the pipeline: additions of an installed package to a model."""
