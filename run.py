"""Train one run, or a Hydra multirun of many: python run.py -m dataset=digits optim=adam,adam_lawn seed=0,1,2"""

import os
import signal
import sys
import traceback
from contextlib import suppress
from types import FrameType
from typing import Any


def stop(number: int, _: FrameType | None) -> None:
    """The signal handler during the imports below, which take seconds."""
    with suppress(OSError):
        os.write(2, f"{signal.Signals(number).name}: stopped before the run started\n".encode())
    os._exit(75)


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):  # as in lawn.child_signals, which is not imported yet
        if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) != signal.SIG_IGN:
            signal.signal(getattr(signal, name), stop)

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lawn.compose import CONF, overrides_of, refuse_sweeps, refuse_unknown_preset
from lawn.config import Config, register
from lawn.errors import ConfigError, UserError
from lawn.explain import explain, is_hydra_error
from lawn.output import echo, is_lost
from lawn.train import Stopped, launched_by_torchrun, prepare, report_submitit_jobs, train, train_many
from lawn.train.signals import raise_on_signal
from lawn.validation import validate

register()
PROCESS, DEBUG = os.getpid(), os.environ.get("HYDRA_FULL_ERROR") == "1"  # Hydra's switch for tracebacks
jobs: list[str] = []  # of this process
failures: list[int] = []  # exit codes of failed jobs; the others of a multirun go on
waiting: list[Config] = []  # runs with train.vectorize


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def run(composed: DictConfig) -> dict[str, Any] | None:
    elsewhere = os.getpid() != PROCESS  # in a process of a launcher, which returns result or error to this one
    job = HydraConfig.get()
    jobs.append(" ".join(overrides_of(job)))
    of = f"in the job {jobs[-1]}: " if job.mode == RunMode.MULTIRUN else ""
    try:
        refuse_unknown_preset(job)
        refuse_sweeps(overrides_of(job), job.sweeper.params or {}, multirun=job.mode == RunMode.MULTIRUN)
        config = validate(composed)
        if config.train.vectorize and not elsewhere:
            prepare(config)
            waiting.append(config)
            return None
        if config.train.vectorize:
            echo("warning: train.vectorize: the launcher gives each run to a process, where it trains alone")
        return train(config)
    except (UserError, OSError) as error:  # OSError: a full disk, an invalid path
        if elsewhere:
            echo(f"error: {error}", sys.stderr)
            raise (type(error) if isinstance(error, UserError) else UserError)(f"{of}{error}") from error
        if launched_by_torchrun() or DEBUG:  # other ranks may be in this job: all end
            raise
        fail(error, of)
    except Stopped as stop:
        if not elsewhere:
            raise
        passed_on = UserError(f"{of}{stop}")
        passed_on.exit_code = stop.exit_code
        raise passed_on from stop
    except Exception:
        if elsewhere:  # the waiting process gets it without traceback
            traceback.print_exc()
        raise
    return None


def fail(error: Exception, of: str = "") -> None:
    failures.append(getattr(error, "exit_code", 2 if is_hydra_error(error) else UserError.exit_code))
    echo(f"error: {of}{explain(error)}", sys.stderr)


def main() -> int:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra prints several lines and exits; here it raises
    failures[:], waiting[:], jobs[:] = [], [], []
    multirun = [given for given in sys.argv[1:] if given in ("-m", "--multirun")]
    sys.argv[1:] = [*multirun, *(given for given in sys.argv[1:] if given not in multirun)]  # not between overrides
    try:
        with raise_on_signal():
            with report_submitit_jobs(sys.argv[1:], fail):
                run()
            list(map(fail, train_many(waiting)))
        if not jobs and multirun and not any("hydra/launcher=" in a for a in sys.argv):
            raise ConfigError(f"{' '.join(sys.argv[1:])}: expands to no job")
    except Exception as error:
        if isinstance(error, BrokenPipeError) and not jobs and is_lost(sys.stdout):  # of what Hydra prints, as --help
            return 0
        if DEBUG or not (is_hydra_error(error) or isinstance(error, UserError | OSError)):
            raise
        fail(error)
    except KeyboardInterrupt as stop:  # a Stopped among them
        echo(str(stop) or "interrupted; run the same command again to resume", sys.stderr)
        failures.append(getattr(stop, "exit_code", 130))
    return max(failures, default=0)


if __name__ == "__main__":
    sys.exit(main())
