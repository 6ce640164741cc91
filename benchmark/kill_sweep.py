"""Kills small runs with SIGKILL, resumes them, and compares their ends with an undisturbed one, bit for bit.

    python benchmark/kill_sweep.py --kills 50                    both scripts
    python benchmark/kill_sweep.py --kills 5 --scripts poco      a short one

Of five kills one comes while a file is being written, the others at moments drawn uniformly over the run.
"""

import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    *("--env-id", "FetchReach-v4", "--num-demos", "8", "--bc-steps", "100", "--hidden-dim", "64"),
    *("--batch-size", "64", "--num-critics", "2", "--total-timesteps", "1000", "--eval-interval", "200"),
    *("--critic-warmup", "400", "--eval-episodes", "4", "--log-interval", "150", "--utd-ratio", "0.1"),
    *("--torch-threads", "1"),
]


@dataclass
class Args:
    kills: int = 50  # of each script
    scripts: tuple[str, ...] = ("poco", "ogpo")
    seed: int = 0  # of the moments


def start(script: str, *arguments: str, cwd: Path) -> subprocess.Popen:
    with open(cwd / "log.txt", "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / f"{script}.py"), *arguments]
        return subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log)


def folder_of(cwd: Path, timeout: float = 120) -> Path:
    """Waits for the run's folder, which is there before behaviour cloning begins."""
    deadline = time.monotonic() + timeout
    while not (found := list(cwd.glob("runs/*/checkpoint.pt"))):
        if time.monotonic() > deadline:
            raise TimeoutError((cwd / "log.txt").read_text())
        time.sleep(0.005)
    return found[0].parent


def end_of(folder: Path) -> tuple:
    """What must be equal: metrics.csv but for the seconds, and all weights of the policy file."""
    with open(folder / "metrics.csv") as file:
        rows = [row | {"seconds": ""} for row in csv.DictReader(file)]
    content = torch.load(folder / "policy.pt", weights_only=True)
    return rows, [content[part][key] for part in ("policy", "critic") for key in content[part]]


def sweep(script: str, kills: int, rng: random.Random) -> bool:
    """Returns: whether every kill was followed by the undisturbed run's end."""
    with tempfile.TemporaryDirectory() as name:
        cwd = Path(name)
        process = start(script, *SMALL, cwd=cwd)
        folder, begin = folder_of(cwd), time.monotonic()
        assert process.wait() == 0, (cwd / "log.txt").read_text()
        duration, reference = time.monotonic() - begin, end_of(folder)
    print(f"{script}.py: the undisturbed run takes {duration:.1f} s after its start", flush=True)
    identical = 0
    for i in range(kills):
        with tempfile.TemporaryDirectory() as name:
            cwd = Path(name)
            process = start(script, *SMALL, cwd=cwd)
            folder = folder_of(cwd)
            moment = time.monotonic() + rng.uniform(0, 1) * duration
            while process.poll() is None and time.monotonic() < moment:
                time.sleep(0.002)
            while process.poll() is None and i % 5 == 0 and not list(folder.glob("*.tmp")):
                pass  # a file is written within milliseconds
            process.kill()
            process.wait()
            table = folder / "metrics.csv"
            rows = len(table.read_text().splitlines()) - 1 if table.exists() else 0
            writing = ", while writing" if list(folder.glob("*.tmp")) else ""
            code = start(script, "--resume", str(folder.relative_to(cwd)), cwd=cwd).wait()
            end = end_of(folder) if code == 0 else ([], [])
            same = end[0] == reference[0] and all(map(torch.equal, end[1], reference[1]))
        identical += same
        result = "the undisturbed end" if same else "ANOTHER END"
        print(f"  {i + 1:>3} of {kills}, killed after {rows} rows{writing}: {result}", flush=True)
    print(f"{script}.py: {identical} of {kills} ended as the undisturbed run", flush=True)
    return identical == kills


if __name__ == "__main__":
    args = tyro.cli(Args)
    rng = random.Random(args.seed)
    results = [sweep(script, args.kills, rng) for script in args.scripts]
    if not all(results):
        sys.exit(1)
