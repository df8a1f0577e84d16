"""Loggers: where the rows of metrics.csv go beside the file."""

import os
import secrets
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from threading import Thread
from typing import Any, ClassVar

from lawn.arguments import arguments
from lawn.config import Config
from lawn.errors import ConfigError
from lawn.files import write_text
from lawn.identity import identity
from lawn.output import echo
from lawn.packages import check_installed

TIMEOUT_SECONDS = 60.0  # of each call to wandb


class CSVLogger:
    """Does nothing: metrics.csv is always written."""

    def __init__(self, config: Config, run_id: str, directory: Path) -> None: ...
    def log(self, row: dict[str, Any]) -> None: ...
    def finish(self, result: dict[str, Any]) -> None: ...


class WandbLogger:
    """One wandb run for each run directory, continued when the run is resumed.

    A failure is printed once and ends the logging, not the run. A server that does not answer ends the logging of all
    runs of the process.
    """

    silent: ClassVar[bool] = False

    def __init__(
        self, config: Config, run_id: str, directory: Path, *, project: str | None = None, mode: str | None = None
    ) -> None:
        def start() -> Any:
            import wandb  # a second to import: only for those who use it

            return wandb.init(
                project=project or os.environ.get("WANDB_PROJECT", "lawn"),
                mode=mode,  # type: ignore[arg-type]  # a Literal there, which lawn.validation has checked
                id=_id(run_id, directory),
                name=directory.name,
                resume="allow",
                reinit="create_new",  # vectorized runs log at the same time
                dir=str(directory),
                config={**identity(config), "logger": asdict(config.logger)},
            )

        self._run: Any = None
        if not WandbLogger.silent:
            self._run = self._attempt(start)

    def log(self, row: dict[str, Any]) -> None:
        if self._run is not None and not WandbLogger.silent:
            self._attempt(lambda: self._run.log(row, step=row["epoch"]))

    def finish(self, result: dict[str, Any]) -> None:
        if self._run is not None and not WandbLogger.silent:
            self._attempt(lambda: self._run.summary.update(result))
        if self._run is not None and not WandbLogger.silent:
            self._attempt(lambda: self._run.finish())

    def _attempt(self, action: Callable[[], Any]) -> Any:
        """The result of the action, or None if it fails: the run goes on whatever a remote service does."""
        found: Future[Any] = Future()

        def work() -> None:
            try:
                found.set_result(action())
            except Exception as error:
                found.set_exception(error)

        Thread(target=work, daemon=True).start()
        try:
            return found.result(TIMEOUT_SECONDS)
        except TimeoutError:
            problem = f"no answer in {TIMEOUT_SECONDS:g} s"
            WandbLogger.silent = True
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        echo(f"wandb: {problem}; logging to it ends here")
        self._run = None


def _id(run_id: str, directory: Path) -> str:
    """The id of the wandb run of a directory, in a file there: one that is begun anew, or another of the same run, has
    its own. wandb ignores rows of epochs that it has."""
    path = directory / "wandb_id"
    if not path.exists():
        write_text(path, f"{run_id}-{secrets.token_hex(4)}\n")
    return path.read_text("utf8").strip()


Logger = CSVLogger | WandbLogger
LOGGERS: dict[str, type[CSVLogger] | type[WandbLogger]] = {"csv": CSVLogger, "wandb": WandbLogger}


def logger_builder(config: Config) -> Callable[[str, Path], Logger]:
    """Check the chosen logger; the result starts it, given a run's id and directory. Raises ConfigError."""
    if config.logger.name not in LOGGERS:
        raise ConfigError(f"logger={config.logger.name}: no such logger; choose from {', '.join(LOGGERS)}")
    kind = LOGGERS[config.logger.name]
    if kind is WandbLogger:
        check_installed("wandb", "logger=wandb", "wandb")
    given = arguments("logger", config.logger, kind)
    return lambda run_id, directory: kind(config, run_id, directory, **given)
