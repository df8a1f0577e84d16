"""Stand-ins for Slurm's commands, which run the jobs of one machine as processes of it.

python slurm_stand_in.py sbatch|srun|squeue|scontrol ..., with the state of jobs in $SLURM_STAND_IN:
`ID` has the state of a job, `ID.pids` its processes; `ID.requeue` exists when it was requeued.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

STATE = Path(os.environ.get("SLURM_STAND_IN", "."))


def install(folder: Path, state: Path) -> dict[str, str]:
    """Put the commands into a folder; returns the variables with which they are found."""
    folder.mkdir()
    state.mkdir()
    for name in ("sbatch", "srun", "squeue", "scontrol"):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", "SLURM_STAND_IN": str(state)}


def sbatch(script: str) -> None:
    text = Path(script).read_text()
    number = 1000 + len(list(STATE.glob("*.sh")))
    (STATE / f"{number}.sh").write_text(text)
    array = re.search(r"#SBATCH --array=0-(\d+)", text)
    ids = [f"{number}_{k}" for k in range(int(array[1]) + 1)] if array else [str(number)]
    for job in ids:
        (STATE / job).write_text("PENDING")
        command = [sys.executable, __file__, "job", job]
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    print(f"Submitted batch job {number}")


def job(job: str) -> None:
    """The life of a job: it runs again as long as it was requeued."""
    number, _, index = job.partition("_")
    variables = {**os.environ, "SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "1"}
    if index:
        variables |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": index}
    text = (STATE / f"{number}.sh").read_text()
    tasks = re.search(r"--ntasks-per-node=(\d+)", text)
    variables["SLURM_NTASKS"] = tasks[1] if tasks else "1"
    while True:
        (STATE / job).write_text("RUNNING")
        code = subprocess.run(["bash", str(STATE / f"{number}.sh")], env=variables).returncode
        requeued = STATE / f"{job}.requeue"
        if not requeued.exists():
            break
        requeued.unlink()
    (STATE / job).write_text("FAILED" if code else "COMPLETED")


def srun(*arguments: str) -> None:
    job = "_".join(filter(None, (os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_TASK_ID"))))
    places = [arguments[arguments.index(name) + 1] for name in ("--output", "--error")]
    command = list(arguments[arguments.index(sys.executable) :])
    tasks = []
    for task in range(int(os.environ["SLURM_NTASKS"])):
        files = [
            Path(place.replace("%A", os.environ["SLURM_JOB_ID"]).replace("%j", job).replace("%t", str(task)))
            for place in (p.replace("%a", os.environ.get("SLURM_ARRAY_TASK_ID", "")) for p in places)
        ]
        out, err = (file.open("a") for file in files)
        variables = {**os.environ, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "SLURM_NODEID": "0"}
        tasks.append(subprocess.Popen(command, env=variables, stdout=out, stderr=err))
    (STATE / f"{job}.pids").write_text(" ".join(str(task.pid) for task in tasks))
    sys.exit(max(abs(task.wait()) for task in tasks))


def squeue(*_: str) -> None:
    for path in STATE.iterdir():
        if not path.suffix:
            print(path.name, path.read_text())


def scontrol(action: str, job: str) -> None:
    assert action == "requeue"
    (STATE / f"{job}.requeue").touch()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
