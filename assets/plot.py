"""Draws success against environment steps and wall time, a line for each setting, and prints a table.

pip install matplotlib && python assets/plot.py runs/* --out assets/success.svg
"""

import csv
import sys
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ogpo
import poco

IGNORED = {"env_id", "seed", "total_timesteps", "torch_threads", "device", "eval_interval", "resume"}
TITLES = "environment", "command", "seeds", "clone", "at the end", "lowest", "steps to 90 %", "minutes"


@dataclass
class Args:
    runs: tyro.conf.Positional[list[Path]]  # run folders that have ended
    out: Path = Path("assets/success.svg")


def setting_of(folder: Path) -> tuple[str, str, int]:
    """Environment, command with what differs from the defaults, seed."""
    script = {"poco": poco, "ogpo": ogpo}[folder.name.split("__")[1]]
    args, defaults = torch.load(folder / "policy.pt", weights_only=True)["args"], vars(script.Args())
    changed = [name for name, value in defaults.items() if name not in IGNORED and args[name] != value]
    options = [f"--{name.replace('_', '-')} {args[name]}" for name in changed]
    return args["env_id"], " ".join([f"{script.METHOD}.py", *options]), args["seed"]


def curve_of(folder: Path) -> np.ndarray:
    """Rows of environment steps, minutes, success: (n, 3)."""
    with open(folder / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["eval/success"]]
    columns = ("global_step", "seconds", "eval/success")
    return np.array([[float(row[name]) for name in columns] for row in rows]) / [1, 60, 1]


def main(args: Args) -> None:
    groups = defaultdict(list)
    for folder in args.runs:
        env_id, command, seed = setting_of(folder)
        groups[env_id, command].append((seed, curve_of(folder)))
    environments = sorted({env_id for env_id, _ in groups})
    size = (10, 4 * len(environments))
    figure, axes = plt.subplots(len(environments), 2, figsize=size, sharey=True, squeeze=False)
    print(f"| {' | '.join(TITLES)} |\n|{'---|' * len(TITLES)}")
    for (env_id, command), runs in sorted(groups.items()):
        seeds, curves = zip(*sorted(runs, key=lambda run: run[0]), strict=True)
        steps, minutes, success = np.moveaxis(np.array(curves), 2, 0)  # (seeds, evaluations) each
        for axis, x in zip(axes[environments.index(env_id)], (steps / 1000, minutes), strict=True):
            (line,) = axis.plot(x.mean(0), success.mean(0), label=textwrap.fill(command, 48))
            low, high = success.min(0), success.max(0)
            axis.fill_between(x.mean(0), low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            axis.set(title=env_id, ylim=(0, 1.02))
            axis.grid(alpha=0.3)
        reached = [next((f"{row[0]:.0f}" for row in curve if row[2] >= 0.9), "-") for curve in curves]
        parts = success[:, 0], success[:, -1], success[:, 1:].min(1)
        percent = [[f"{100 * value:.0f}" for value in part] for part in parts]
        columns = [map(str, seeds), *percent, reached, [f"{value:.1f}" for value in minutes[:, -1]]]
        print(f"| {env_id} | `{command}` | {' | '.join(', '.join(column) for column in columns)} |")
    for left, right in axes:
        left.set(xlabel="online environment steps / 1000", ylabel="success, mean and range over seeds")
        right.set(xlabel="minutes since the start, cloning included")
        left.legend(fontsize=6, loc="lower right")
    figure.tight_layout()
    figure.savefig(args.out)


if __name__ == "__main__":
    main(tyro.cli(Args))
