"""Draws success against environment steps from run folders, one line for each setting, and prints their table.

pip install matplotlib && python assets/plot.py runs/* --out assets/success.svg
"""

import argparse
import csv
import json
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import poco

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("plot.py needs matplotlib: pip install matplotlib")

parser = argparse.ArgumentParser()
parser.add_argument("runs", nargs="+", type=Path, help="run folders; those without a summary.json are left out")
parser.add_argument("--out", type=Path, default=Path("assets/success.svg"))
options = parser.parse_args()

groups = defaultdict(list)  # (environment, arguments other than the defaults) -> runs
ignored = {"env_id", "seed", "total_timesteps", "torch_threads", "device"}
for folder in options.runs:
    if not (folder / "summary.json").is_file():
        continue
    args = json.loads((folder / "args.json").read_text())
    changed = [f"{name} {args[name]:g}" for name, value in vars(poco.Args()).items() if name not in ignored and args[name] != value]
    with open(folder / "metrics.csv") as file:
        curve = {int(row["global_step"]): float(row["eval/success"]) for row in csv.DictReader(file) if row["eval/success"]}
    summary = json.loads((folder / "summary.json").read_text())
    groups[args["env_id"], ", ".join(changed) or "defaults"].append((args["seed"], curve, summary))


def order(item):
    (env_id, setting), _ = item
    return env_id != "FetchPickAndPlace-v4", env_id, setting != "defaults", setting


environments = list(dict.fromkeys(env_id for (env_id, _), _ in sorted(groups.items(), key=order)))
figure, axes = plt.subplots(1, len(environments), figsize=(1 + 4 * len(environments), 3.8), sharey=True, squeeze=False)
titles = ("environment", "arguments", "seeds", "clone", "at the end", "lowest on the way", "environment steps", "minutes")
print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
for (env_id, setting), runs in sorted(groups.items(), key=order):
    seeds, curves, summaries = zip(*sorted(runs, key=lambda run: run[0]), strict=True)
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves])
    axis = axes[0, environments.index(env_id)]
    (line,) = axis.plot(np.array(steps) / 1000, values.mean(0), label=textwrap.fill(setting, 36))
    axis.fill_between(np.array(steps) / 1000, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(title=env_id, xlabel="online environment steps / 1000", ylim=(0, 1.02))
    columns = [
        [str(seed) for seed in seeds],
        [f"{100 * summary['bc_success']:.0f}" for summary in summaries],
        [f"{100 * summary['final_success']:.0f}" for summary in summaries],
        [f"{100 * min(list(curve.values())[1:]):.0f}" for curve in curves],
        [str(summaries[0]["env_steps"])],
        [f"{summary['wall_time_s'] / 60:.1f}" for summary in summaries],
    ]
    print(f"| {env_id} | {setting} | {' | '.join(', '.join(column) for column in columns)} |")
axes[0, 0].set_ylabel("success, mean and range over seeds")
for axis in axes[0]:
    axis.grid(alpha=0.3)
    axis.legend(fontsize=6, loc="best")
figure.tight_layout()
figure.savefig(options.out)
