"""The projects whose checkpoints can be converted, each in a file of its own."""
