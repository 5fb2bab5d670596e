"""What an image with very many boxes takes in training, measured as the peak of a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from processes import SCRIPTS, environment_of_scripts


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory is read from Linux's /proc")
@pytest.mark.parametrize("padding", ["seen", "masked"])
def test_memory_of_training_grows_with_the_boxes_and_not_with_their_square(padding):
    script = [sys.executable, str(SCRIPTS / "crowded_image.py"), padding, "10", "1000", "2000"]
    done = subprocess.run(script, env=environment_of_scripts(), check=True, capture_output=True, text=True)
    few, many, twice = map(int, done.stdout.split())
    assert twice - few < 2048  # 2 GiB
    # Linear, the second thousand takes as much as the first; with a matrix of all pairs, three times as much.
    assert twice - many < 1.5 * (many - few)
