"""sbatch, srun, sacct and scontrol as far as submitit calls them; what they are told to start really runs, on this machine.

slurm_like.py NAME ARGUMENT ...        what is known of the jobs stands in the folder SLURM_LIKE
"""

import os
import re
import subprocess
import sys
from pathlib import Path

STATE = Path(os.environ.get("SLURM_LIKE", "."))
JOB = "1001"


def install(folder: Path) -> None:
    """The commands, in a folder for PATH."""
    folder.mkdir()
    for name in ("sbatch", "srun", "sacct", "scontrol", "scancel"):
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).resolve()} {name} "$@"\n')
        command.chmod(0o755)


def sbatch(script: str) -> None:
    """Starts every task of the array in the background."""
    text = Path(script).read_text()
    (STATE / "script.sh").write_text(text)
    tasks = int(re.findall(r"^#SBATCH --array=0-(\d+)%\d+$", text, re.MULTILINE)[0]) + 1
    for task in range(tasks):
        name = f"{JOB}_{task}"
        (STATE / f"{name}.state").write_text("RUNNING")
        environment = {"SLURM_JOB_ID": str(int(JOB) + task), "SLURM_ARRAY_JOB_ID": JOB, "SLURM_ARRAY_TASK_ID": str(task),
                       "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0",
                       "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "here"}  # fmt: skip
        command = [sys.executable, __file__, "job", name, str(STATE / "script.sh")]
        subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    print(f"Submitted batch job {JOB}")


def job(name: str, script: str) -> None:
    """Once more for each time it is queued again."""
    while True:
        status = subprocess.run(["bash", script]).returncode
        again = STATE / f"{name}.again"
        if not again.exists():
            break
        again.rename(STATE / f"{name}.was-queued-again")
    (STATE / f"{name}.state").write_text("FAILED" if status else "COMPLETED")


def srun(*arguments: str) -> None:
    rest = list(arguments)
    ids = {
        "%A": JOB,
        "%a": os.environ["SLURM_ARRAY_TASK_ID"],
        "%t": "0",
        "%j": f"{JOB}_{os.environ['SLURM_ARRAY_TASK_ID']}",
    }
    while rest[0].startswith("--"):
        option = rest.pop(0)
        if option in ("--output", "--error"):
            path = rest.pop(0)
            for sign, value in ids.items():
                path = path.replace(sign, value)
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1 if option == "--output" else 2)
    os.execvp(rest[0], rest)


def sacct() -> None:
    print("JobID|State|NodeList")
    for file in STATE.glob("*.state"):
        print(f"{file.stem}|{file.read_text()}|here")


def main(name: str, *arguments: str) -> None:
    if name == "sacct":
        sacct()
    elif name == "scontrol":
        (STATE / f"{arguments[1]}.again").touch()
    else:
        {"sbatch": sbatch, "job": job, "srun": srun}[name](*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
