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
    """The jobs of this user that Slurm has not ended."""

    def __init__(self) -> None:
        self._jobs: set[str] | None = set()  # None: Slurm does not answer
        self._asked = -inf

    def may_have(self, job_id: str) -> bool:
        """Whether a job waits or runs, as far as is known."""
        if time.monotonic() - self._asked >= QUEUE_SECONDS:
            self.ask()
        return self._jobs is None or job_id in self._jobs

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
        self._asked = time.monotonic()
