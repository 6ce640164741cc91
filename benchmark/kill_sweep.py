"""Kills small FetchReach runs with SIGKILL, resumes each, and compares its end with that of an undisturbed run, bit for bit.

    python benchmark/kill_sweep.py --kills 50                    both scripts
    python benchmark/kill_sweep.py --kills 5 --scripts poco      a short one

Of five kills one comes while a file is being written, one during behaviour cloning or the evaluation after it, the others at moments drawn
uniformly over the run.
"""

import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    *("--env-id", "FetchReach-v4", "--num-demos", "8", "--bc-steps", "100", "--hidden-dim", "64", "--batch-size", "64"),
    *("--num-critics", "2", "--total-timesteps", "1000", "--critic-warmup-steps", "400", "--eval-interval", "300"),
    *("--eval-episodes", "4", "--log-interval", "150", "--checkpoint-interval", "200", "--torch-threads", "1", "--utd-ratio", "0.1"),
]
# as the script's own last lines, but with short evaluations at the start and at the end
MAIN = "import {0} as s; s.FINAL_EPISODES = 4; args = s.tyro.cli(s.Args); s.main(s.resumed_args(args) if args.resume else args)"


@dataclass
class Args:
    kills: int = 50  # of each script
    scripts: tuple[str, ...] = ("poco", "ogpo")
    seed: int = 0  # of the moments


def start(script: str, *arguments: str, cwd: Path) -> subprocess.Popen:
    with open(cwd / "log.txt", "a") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", MAIN.format(script), *arguments]
        return subprocess.Popen(command, cwd=cwd, env=environment, stdout=log, stderr=log)


def run_dir(cwd: Path, timeout: float = 120) -> Path:
    """Waits for the run's folder, which is there before behaviour cloning begins."""
    deadline = time.monotonic() + timeout
    while not (found := list(cwd.glob("runs/*/wall_time.csv"))):
        if time.monotonic() > deadline:
            raise TimeoutError((cwd / "log.txt").read_text())
        time.sleep(0.005)
    return found[0].parent


def end_of(folder: Path) -> tuple:
    """What must be equal: metrics.csv, and all weights of the last and the best policy."""
    weights = []
    for name in ("policy.pt", "policy_best.pt"):
        content = torch.load(folder / name, weights_only=True)
        weights += [(name, key, content[part][key]) for part in ("policy", "critic") for key in content[part]]
    return (folder / "metrics.csv").read_text(), weights


def differences(a: tuple, b: tuple) -> list[str]:
    metrics = ["metrics.csv"] * (a[0] != b[0])
    return metrics + [f"{name} {key}" for (name, key, x), (_, _, y) in zip(a[1], b[1], strict=True) if not torch.equal(x, y)]


def phase_of(folder: Path, warm_up: int = 400) -> str:
    if list(folder.glob("*.tmp")):
        return "writing a file"
    if not (folder / "policy.pt").exists():
        return "behaviour cloning or first evaluation"
    rows = (folder / "metrics.csv").read_text().splitlines()
    return "warm-up" if len(rows) < 2 or int(rows[-1].split(",")[0]) < warm_up else "online"


def sweep(script: str, kills: int, rng: random.Random) -> bool:
    """Returns: whether every kill was followed by the undisturbed run's end."""
    with tempfile.TemporaryDirectory() as name:
        cwd = Path(name)
        process = start(script, *SMALL, cwd=cwd)
        folder, begin = run_dir(cwd), time.monotonic()
        assert process.wait() == 0, (cwd / "log.txt").read_text()
        duration, reference = time.monotonic() - begin, end_of(folder)
    print(f"{script}.py: the undisturbed run takes {duration:.1f} s after its start", flush=True)
    phases, resumed, identical = Counter(), 0, 0
    for i in range(kills):
        with tempfile.TemporaryDirectory() as name:
            cwd = Path(name)
            process = start(script, *SMALL, cwd=cwd)
            folder = run_dir(cwd)
            moment = time.monotonic() + rng.uniform(0, 0.08 if i % 5 == 1 else 1) * duration
            while process.poll() is None and time.monotonic() < moment:
                time.sleep(0.002)
            while process.poll() is None and i % 5 == 0 and not list(folder.glob("*.tmp")):
                pass  # a file is written within milliseconds
            process.kill()
            over = process.wait() == 0  # it was faster than the undisturbed run: then --resume must change nothing
            phase = "over" if over else phase_of(folder)
            code = start(script, "--resume", str(folder.relative_to(cwd)), cwd=cwd).wait()
            wrong = differences(end_of(folder), reference) if code == 0 else [(cwd / "log.txt").read_text()]
        phases[phase], resumed, identical = phases[phase] + 1, resumed + (code == 0), identical + (not wrong)
        print(f"  {i + 1:>3} of {kills}, killed in: {phase}" + f"; DIFFERENT: {wrong[:4]}" * bool(wrong), flush=True)
    print(f"{script}.py: {resumed} of {kills} resumed, {identical} of {kills} ended as the undisturbed run; {dict(phases)}", flush=True)
    return identical == kills


if __name__ == "__main__":
    args = tyro.cli(Args)
    rng = random.Random(args.seed)
    results = [sweep(script, args.kills, rng) for script in args.scripts]
    if not all(results):
        sys.exit(1)
