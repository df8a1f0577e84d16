"""The ranks of a run as processes of this machine."""

import logging
import signal
import sys
import tempfile
import traceback
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

from lawn.child_signals import signals_blocked
from lawn.config import Config
from lawn.errors import RunError, UserError
from lawn.train.distributed import init_on_one_machine
from lawn.train.prepare import PreparedRun, prepare
from lawn.train.session import run_rank
from lawn.train.signals import Stopped, deferred_signals, end_with_parent, raise_on_signal
from lawn.train.torch_errors import RESUME_HINT, LostRankError


def run_in_processes(run: PreparedRun, size: int, method: str) -> dict[str, Any]:
    """Start `size` ranks by a start method of multiprocessing and wait for them; if one fails, all end."""
    context = multiprocessing.get_context(method)
    logging.getLogger("torch.multiprocessing.spawn").setLevel("ERROR")  # it warns of each rank that it terminates
    context.set_forkserver_preload([__name__, "torch._dynamo", "sklearn.datasets"])
    threads = max(1, torch.get_num_threads() // size)
    with tempfile.TemporaryDirectory() as folder, deferred_signals() as request:
        with signals_blocked(method):
            errors: SimpleQueue = context.SimpleQueue()
            arguments = (run.config, size, threads, str(Path(folder) / "store"), errors)
            ranks = multiprocessing.start_processes(_rank_process, arguments, size, join=False, start_method=method)
        assert ranks is not None
        try:
            while not ranks.join(timeout=1):
                if request.signal:
                    for process in ranks.processes:
                        process.terminate()  # the ranks agree on where to stop
        except (multiprocessing.ProcessExitedException, multiprocessing.ProcessRaisedException) as error:
            cause = _cause(ranks.processes, errors)
            if cause is None and request.signal:  # it came before the first update, or after the last
                cause = Stopped(f"{request.signal}: {run.directory.name} has stopped; {RESUME_HINT}")
            raise cause or error from None
        finally:
            for process in ranks.processes:
                process.terminate()
    return run.directory.result()


def _rank_process(rank: int, config: Config, size: int, threads: int, store: str, errors: SimpleQueue) -> None:
    """The main function of a rank's process."""
    torch.set_num_threads(threads)
    try:
        with raise_on_signal():
            end_with_parent()
            with init_on_one_machine(config.device, rank, size, store) as world:
                run_rank(prepare(config), world)
    except Stopped as stopped:  # by the user, or because another rank has died
        errors.put((True, stopped))
        sys.exit(stopped.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError) as error:
        errors.put((isinstance(error, LostRankError), error))
        sys.exit(1)
    except Exception as error:
        traceback.print_exc()
        errors.put((False, RunError(f"rank {rank}: {type(error).__name__}: {error}")))
        sys.exit(1)


def _cause(processes: list[Any], errors: SimpleQueue) -> BaseException | None:
    """The error of a rank, or the signal that killed one. That the others then lost the connection, or were stopped, is
    a cause only without such a one.
    """
    reported = []
    while not errors.empty():
        reported.append(errors.get())
    for follows, error in reported:
        if not follows:
            return error
    for rank, process in enumerate(processes):
        code = process.exitcode or 0
        if code < 0 and -code != signal.SIGTERM:
            return RunError(
                f"rank {rank} was killed by {signal.Signals(-code).name}; the others were stopped; {RESUME_HINT}"
            )
    return reported[0][1] if reported else None
