"""The progress bar on a terminal, and its silence elsewhere."""

import io

from rich.console import Console

from dino_hf.common.progress import ProgressBar


def shown(is_terminal: bool, use, **settings) -> str:
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=150)
    with ProgressBar(console, **settings) as bar:
        use(bar)
    return console.file.getvalue()


def two_stages(bar):
    bar("images", 0, 7)
    bar("images", 7, 7, title="[looking]", note="loss 0.5")
    bar("classes", 1, None)


def test_each_stage_has_its_counts_title_and_note():
    text = shown(True, two_stages)
    for part in ("7/7", "[looking]", "loss 0.5", "classes", "1/?", "left"):
        assert part in text
    assert "left" not in shown(True, two_stages, estimate=False)


def test_without_a_terminal_nothing_is_shown():
    assert shown(False, two_stages).strip() == ""


def test_items_are_counted_as_they_are_followed():
    def follow(bar):
        assert list(bar.follow(iter("abc"), "letters", 3)) == ["a", "b", "c"]

    assert "3/3" in shown(True, follow)
