"""What a run leaves behind while it goes on: rows to the logger and the terminal, checkpoints, the result."""

import time
from typing import Any

from lawn.config import Config
from lawn.train.logger import Logger
from lawn.train.loop import Run, summary
from lawn.train.progress import Progress
from lawn.train.record import RunDirectory


class Journal:
    """Kept by the main rank."""

    def __init__(self, config: Config, directory: RunDirectory, logger: Logger, epochs_done: int) -> None:
        self._directory = directory
        self._logger = logger
        self._progress = Progress(directory.path.name, epochs_done, config.train.epochs)
        self._seconds = config.train.checkpoint_seconds
        self._saved = time.monotonic()

    def epoch(self, run: Run) -> None:
        """Show and log the newest row; a checkpoint if it is time for one, or the run has ended."""
        row = run.rows[-1]
        with run.clock("log"):
            self._progress.epoch(row)
            self._logger.log(row)
            if self.due or run.status != "running":
                self.checkpoint(run.state_dict())

    @property
    def due(self) -> bool:
        """Whether it is time for a checkpoint."""
        return time.monotonic() - self._saved >= self._seconds

    def checkpoint(self, state: dict[str, Any]) -> None:
        self._directory.write_metrics(state["rows"])
        self._directory.save(state)
        self._saved = time.monotonic()

    def finish(self, run: Run) -> dict[str, Any]:
        """Write the result, which is returned, and the marker of a finished run."""
        self._progress.close()
        result = run.result()
        self._directory.write_metrics(run.rows)
        self._directory.finish(result)
        self._logger.finish(result)
        print(summary(result), flush=True)
        return result
