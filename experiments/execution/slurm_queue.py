"""Slurm's queue, as `squeue` tells it."""

import os
import subprocess
import time
from math import inf

from lawn.output import echo

QUEUE_SECONDS = 30.0  # after which Slurm is asked again for its queue
ENDED = (  # states of a job
    *("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"),
    *("REVOKED", "TIMEOUT"),
)


class SlurmQueue:
    """The jobs of this user, as far as Slurm still knows them."""

    def __init__(self) -> None:
        self._jobs: set[str] | None = set()  # that it has not ended; None: it does not answer
        self._cancelled: set[str] = set()  # Slurm may soon forget them
        self._asked = -inf

    def may_have(self, job_id: str) -> bool:
        """Whether a job waits or runs, as far as is known."""
        if time.monotonic() - self._asked >= QUEUE_SECONDS:
            self.ask()
        return self._jobs is None or job_id in self._jobs

    def was_cancelled(self, job_id: str) -> bool:
        """Whether a job was cancelled (`scancel`), as far as is known."""
        return job_id in self._cancelled

    def ask(self) -> None:
        """Ask Slurm now."""
        command = ["squeue", "--noheader", "--array", "--states=all", f"--user={os.getuid()}", "--format=%i %T"]
        try:
            answer = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
        except (OSError, subprocess.SubprocessError) as error:
            if self._jobs is not None:
                echo(f"{error}; until it succeeds, a job that is lost is not noticed")
            self._jobs = None
        else:
            states = [line.split() for line in answer.splitlines()]
            self._jobs = {state[0] for state in states if state and state[-1] not in ENDED}
            self._cancelled |= {state[0] for state in states if state and state[-1] == "CANCELLED"}
        self._asked = time.monotonic()
