"""Progress output: a bar on a terminal and in a notebook, a line every few seconds elsewhere."""

import sys
import time
from typing import IO, Any

from tqdm import tqdm

from lawn.output import echo, keep_going

SECONDS_BETWEEN_LINES = 10.0


def shows_bars(stream: IO[str] | None) -> bool:
    """Whether lines of `stream` can be overwritten: on a terminal and in a notebook (whose isatty() is False).

    `stream` is None if it was closed before the start.
    """
    return stream is not None and (stream.isatty() or type(stream).__module__ == "ipykernel.iostream")


class Progress:
    def __init__(self, name: str, done: int, total: int) -> None:
        self._name, self._total, self._bar = name, total, None
        if shows_bars(sys.stderr):
            with keep_going(sys.stderr):
                self._bar = tqdm(total=total, initial=done, desc=name, unit="epoch")
        self._last = 0.0

    def epoch(self, row: dict[str, Any]) -> None:
        """Show the row of an epoch."""
        hidden = ("epoch", "step", "constrained", "lr")
        shown = {k: v for k, v in row.items() if k not in hidden and "/" not in k and v is not None}
        text = "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
        if self._bar is not None:
            with keep_going(sys.stderr):
                self._bar.set_postfix_str(text, refresh=False)
                self._bar.update()
        elif row["epoch"] == self._total or time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            echo(f"{self._name}  epoch {row['epoch']}/{self._total}  {text}")
            self._last = time.monotonic()

    def close(self) -> None:
        if self._bar is not None:
            with keep_going(sys.stderr):
                self._bar.close()
