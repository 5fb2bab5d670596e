"""`python -m dino_hf`, the same as `dino-hf`."""

from .cli.app import app

if __name__ == "__main__":
    app(prog_name="dino-hf")
