"""Draws success against environment steps from run folders, one line per setting, and prints the table of the same runs.

pip install matplotlib && python assets/plot.py runs/* --out assets/success.svg
"""

import argparse
import csv
import json
import sys
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

groups = defaultdict(list)  # (environment, settings other than the defaults) -> runs
ignored = {"env_id", "seed", "total_timesteps", "torch_threads", "device"}
for folder in options.runs:
    if (folder / "summary.json").is_file():
        args = json.loads((folder / "args.json").read_text())
        changed = [f"{name} {args[name]:g}" for name, default in vars(poco.Args()).items() if name not in ignored and args[name] != default]
        rows = [row for row in csv.DictReader((folder / "metrics.csv").open()) if row["eval/success"]]
        groups[args["env_id"], ", ".join(changed) or "defaults"].append(
            (args["seed"], rows, json.loads((folder / "summary.json").read_text()))
        )

environments = sorted({env_id for env_id, _ in groups}, key=lambda env_id: (env_id != "FetchPickAndPlace-v4", env_id))
figure, axes = plt.subplots(1, len(environments), figsize=(1 + 4 * len(environments), 3.6), sharey=True, squeeze=False)
print(
    "| environment | settings | seeds | clone | at the end | lowest after going online | env steps | minutes |\n|---|---|---|---|---|---|---|---|"
)
for (env_id, label), runs in sorted(
    groups.items(), key=lambda item: (environments.index(item[0][0]), item[0][1] != "defaults", item[0][1])
):
    runs.sort(key=lambda run: run[0])
    shared = sorted(set.intersection(*({int(row["global_step"]) for row in rows} for _, rows, _ in runs)))
    curves = np.array([[float(row["eval/success"]) for row in rows if int(row["global_step"]) in shared] for _, rows, _ in runs])
    axis = axes[0, environments.index(env_id)]
    (line,) = axis.plot(shared, curves.mean(0), label=label)
    axis.fill_between(shared, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axis.set(title=env_id, xlabel="online environment steps", ylim=(0, 1.02))
    cells = [" ".join(str(seed) for seed, _, _ in runs)]
    cells += [" ".join(f"{100 * summary[key]:.0f}" for _, _, summary in runs) for key in ("bc_success", "final_success")]
    cells.append(" ".join(f"{100 * curve[1:].min():.0f}" for curve in curves))
    cells += [str(runs[0][2]["env_steps"]), " ".join(f"{summary['wall_time_s'] / 60:.1f}" for _, _, summary in runs)]
    print(f"| {env_id} | {label} | {' | '.join(cells)} |")
axes[0, 0].set_ylabel("success (mean and range over seeds)")
for axis in axes[0]:
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, loc="lower right")
figure.tight_layout()
figure.savefig(options.out)
