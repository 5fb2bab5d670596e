"""The one progress bar. It is shown on terminals only, so that logs stay short."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class ProgressBar:
    """A bar with counts and times. It appears at the first call, and disappears at `close` or at the end of a `with` block.

    Args:
        console: where the bar is shown. If it is not a terminal, nothing is shown.
        estimate: show the time left, estimated from the counts. Without it, pass the time left in `note`, if it is known.
    """

    def __init__(self, console: Console, estimate: bool = True):
        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
        ]
        if estimate:
            columns += [TextColumn("left"), TimeRemainingColumn()]
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, int] = {}

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        if self._tasks and not self._bar.disable:  # otherwise rich before 14.3 prints an empty line
            self._bar.stop()

    def __call__(self, stage: str, done: int, total: int | None, title: str | None = None, note: str = "") -> None:
        """Show how much of a stage is done. Each stage has a line of its own.

        Args:
            total: None if it is unknown.
            title: text of the line, if it differs from `stage`.
            note: text behind the counts.
        """
        if not self._tasks:
            self._bar.start()
        if stage not in self._tasks:
            self._tasks[stage] = self._bar.add_task(stage, total=total, note=note)
        self._bar.update(self._tasks[stage], completed=done, total=total, description=title or stage, note=note)

    def follow(self, items: Iterable, stage: str, total: int | None = None) -> Iterator:
        """Yield the items and count them."""
        self(stage, 0, total)
        for done, item in enumerate(items, start=1):
            yield item
            self(stage, done, total)


@contextmanager
def hide_library_bars() -> Iterator[None]:
    """Hide the progress bars of transformers while it reads and writes files."""
    # Imported here: the bar above is also for commands that need not wait for transformers.
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    were_shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if were_shown:
            enable_progress_bar()
