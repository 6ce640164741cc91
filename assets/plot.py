"""Draws success against environment steps and against wall time from run folders, one line for each setting, and prints their table.

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
import ogpo
import poco

try:
    import matplotlib.pyplot as plt
except ImportError:
    sys.exit("plot.py needs matplotlib: pip install matplotlib")

parser = argparse.ArgumentParser()
parser.add_argument("runs", nargs="+", type=Path, help="run folders; those without a summary.json are left out")
parser.add_argument("--out", type=Path, default=Path("assets/success.svg"))
options = parser.parse_args()

DEFAULTS = {script.METHOD: vars(script.Args()) for script in (poco, ogpo)}
IGNORED = {"seed", "total_timesteps", "torch_threads", "device", "eval_interval"}


def column(path, name):
    with open(path) as file:
        return {int(row["global_step"]): float(row[name]) for row in csv.DictReader(file) if row[name]}


groups = defaultdict(list)  # (environment, method and arguments other than its defaults) -> runs
for folder in options.runs:
    if not (folder / "summary.json").is_file():
        continue
    env_id, method, *_ = folder.name.split("__")
    args = json.loads((folder / "args.json").read_text())
    changed = [
        f"--{name.replace('_', '-')} {args[name]}"
        for name, value in DEFAULTS[method].items()
        if name not in IGNORED | {"env_id"} and args.get(name, value) != value
    ]
    success, single = (column(folder / "metrics.csv", f"eval/{name}") for name in ("success", "ode_success"))
    seconds = column(folder / "wall_time.csv", "seconds")
    summary = json.loads((folder / "summary.json").read_text()) | {"final_single": list(single.values())[-1]}
    groups[env_id, " ".join([f"{method}.py", *changed])].append((args["seed"], success, seconds, summary))

environments = sorted({env_id for env_id, _ in groups})
figure, axes = plt.subplots(len(environments), 2, figsize=(10, 4 * len(environments)), sharey=True, squeeze=False)
titles = [
    "environment",
    "command",
    "seeds",
    "clone",
    "at the end",
    "same with single samples",
    "lowest on the way",
    "steps to 80 %",
    "steps",
    "minutes",
]
print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
for (env_id, setting), runs in sorted(groups.items()):
    seeds, curves, clocks, summaries = zip(*sorted(runs, key=lambda run: run[0]), strict=True)
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves])
    minutes = np.mean([[clock[step] / 60 for step in steps] for clock in clocks], axis=0)
    for axis, x in zip(axes[environments.index(env_id)], (np.array(steps) / 1000, minutes), strict=True):
        (line,) = axis.plot(x, values.mean(0), label=textwrap.fill(setting, 48))
        axis.fill_between(x, values.min(0), values.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=env_id, ylim=(0, 1.02))
    reached = [next((step for step, value in curve.items() if value >= 0.8), None) for curve in curves]
    columns = [
        [str(seed) for seed in seeds],
        [f"{100 * summary['bc_success']:.0f}" for summary in summaries],
        [f"{100 * summary['final_success']:.0f}" for summary in summaries],
        [f"{100 * summary['final_single']:.0f}" for summary in summaries],
        [f"{100 * min(list(curve.values())[1:]):.0f}" for curve in curves],
        ["-" if step is None else str(step) for step in reached],
        [str(summaries[0]["env_steps"])],
        [f"{summary['wall_time_s'] / 60:.1f}" for summary in summaries],
    ]
    print(f"| {env_id} | `{setting}` | {' | '.join(', '.join(column) for column in columns)} |")
for left, right in axes:
    left.set(xlabel="online environment steps / 1000", ylabel="success, mean and range over seeds")
    right.set(xlabel="minutes since the start, cloning included")
    left.legend(fontsize=6, loc="lower right")
    for axis in (left, right):
        axis.grid(alpha=0.3)
figure.tight_layout()
figure.savefig(options.out)
