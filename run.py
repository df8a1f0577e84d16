"""Train one run, or a Hydra multirun of many: python run.py -m dataset=digits optim=adam,adam_lawn seed=0,1,2"""

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType


def leave(number: int, _: FrameType | None) -> None:
    """What a signal does while the modules below are imported, which takes seconds."""
    with suppress(OSError):
        os.write(2, f"{signal.Signals(number).name}: stopped before anything was begun\n".encode())
    os._exit(75)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):  # lawn.signals is not imported yet
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, leave)

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lawn.config import Config, register
from lawn.errors import UserError
from lawn.train import check, started_by_torchrun, train, train_many
from lawn.train.notice import stoppable
from lawn.train.progress import say
from lawn.validation import explain, of_hydra, validate

register()
PROCESS, DEBUG = os.getpid(), os.environ.get("HYDRA_FULL_ERROR") == "1"  # the user's own switch for tracebacks
failures: list[int] = []  # exit codes of this process's jobs: one that fails does not keep a multirun from the others
waiting: list[Config] = []  # runs that train.vectorize asks to train together


@hydra.main(version_base="1.3", config_path=str(Path(__file__).parent / "conf"), config_name="config")
def run(composed: DictConfig) -> None:
    try:
        config = validate(composed)
        waiting.append(check(config)) if config.train.vectorize and os.getpid() == PROCESS else train(config)
    except (UserError, OSError) as error:  # the system's own: a full disk, a path that cannot be
        job = HydraConfig.get()
        of = f"in the job {' '.join(job.overrides.task)}: " if job.mode == RunMode.MULTIRUN else ""
        if os.getpid() != PROCESS:  # a launcher's, which hands the error to the process that waits for it
            raise (type(error) if isinstance(error, UserError) else UserError)(f"{of}{error}") from error
        if started_by_torchrun() or DEBUG:  # other ranks may be in the middle of this job: all end
            raise
        fail(error, of)


def fail(error: Exception, of: str = "") -> None:
    failures.append(getattr(error, "exit_code", 2 if of_hydra(error) else UserError.exit_code))
    say(f"error: {of}{explain(error)}", sys.stderr)


def main() -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra prints several lines and exits; here it raises
    failures[:], waiting[:] = [], []
    try:
        with stoppable():
            run()
            list(map(fail, train_many(waiting)))
    except Exception as error:
        if DEBUG or not (of_hydra(error) or isinstance(error, UserError | OSError)):
            raise
        fail(error)
    except KeyboardInterrupt as stop:  # a Stopped among them
        say(str(stop) or "interrupted; the same command goes on from the last checkpoint", sys.stderr)
        failures.append(getattr(stop, "exit_code", 130))
    return max(failures, default=0)


if __name__ == "__main__":
    sys.exit(main())
