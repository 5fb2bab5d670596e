"""The port against recorded numbers of the original release: rebuild its checkpoint file, convert it, compare."""

import pytest
import torch
from convert_checkpoint import convert, convert_tensors, build_config
from recipe import VARIANTS, load_manifest, load_recorded, make_checkpoint, make_images, make_labels
