"""Options of the converter, for its command and its script. Nothing here imports torch, so `--help` is fast."""

import json
from typing import Any

PROJECT_NAMES = ("original", "stabledino", "detrex", "aligndetr", "mmdet", "codetr_mmdet", "codetr")
MIRROR = "DINO_HF_MIRROR"  # environment variable: address from which published checkpoints are downloaded

HELP = {
    "output": "New folder; with --to, a new .pth file.",
    "source": f"Project of the file: auto, {', '.join(PROJECT_NAMES)}.",
    "to": f"Convert back: write a checkpoint file for this project ({', '.join(PROJECT_NAMES)}).",
    "ema": "Convert the averaged weights.",
    "published": "Name of the published checkpoint that this file is, or none. By default, it is recognised.",
    "label_names": "Class names: COCO json, json list or dictionary, or a text file with one name per line.",
    "image_size": "Shortest and longest edge of images at evaluation.",
    "set": "Set a field of the configuration. May be repeated.",
    "force": "Replace the model in the output folder, or the output file.",
    "verify": "Compare the result with the checkpoint, stage by stage.",
    "image": "Picture for --verify; by default, a drawn one.",
}


def parse_setting(text: str) -> tuple[str, Any]:
    """Split NAME=VALUE. The value is JSON or a plain string.

    Raises:
        ValueError: there is no "=".
    """
    name, separator, value = text.partition("=")
    if not separator:
        raise ValueError(f"--set {text!r} is not of the form NAME=VALUE.")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def check_options(options: dict[str, Any]) -> None:
    """Check that options go together. They have the names of HELP.

    Raises:
        ValueError: an option has no effect, or the output is missing.
    """
    if options["output"] is None:
        names = ("to", "source", "ema", "label_names", "image_size", "set", "force", "verify", "image")
        if any(options[name] and options[name] != "auto" for name in names) or options["published"] in (None, "none"):
            raise ValueError(
                "Name the output: dino-hf convert FILE --output FOLDER. Only a published file goes without, into the cache: "
                "dino-hf convert FILE --published PROJECT/NAME."
            )
    if options["to"]:
        names = ("source", "ema", "published", "label_names", "image_size", "set")
        given = [name for name in names if options[name] and options[name] != "auto"]
        if given:
            unused = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            raise ValueError(f"{unused} have no effect when converting back, --to {options['to']}.")
    if options["image"] and not options["verify"]:
        raise ValueError("--image has an effect only with --verify.")
