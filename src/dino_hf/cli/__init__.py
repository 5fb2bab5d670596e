"""The command `dino-hf`."""
