"""What the user sees while a run goes on: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    def __init__(self, name: str, done: int, total: int) -> None:
        self._name, self._total = name, total
        self._bar = tqdm(total=total, initial=done, desc=name, unit="epoch") if sys.stderr.isatty() else None
        self._last = 0.0

    def epoch(self, row: dict[str, Any]) -> None:
        """Show the row of an epoch that has just ended."""
        hidden = ("epoch", "step", "constrained", "lr")
        shown = {k: v for k, v in row.items() if k not in hidden and "/" not in k and v is not None}
        text = "  ".join(f"{key} {value:.4g}" for key, value in shown.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            self._bar.update()
        elif row["epoch"] == self._total or time.monotonic() - self._last > SECONDS_BETWEEN_LINES:
            print(f"{self._name}  epoch {row['epoch']}/{self._total}  {text}", flush=True)
            self._last = time.monotonic()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
