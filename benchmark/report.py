"""Writes the tables of both READMEs and draws assets/*.svg from results.csv of benchmark/run.py.

    pip install -r benchmark/requirements.txt && python benchmark/report.py
    python benchmark/report.py --check    fails where a README says something else
"""

import csv
import math
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ogpo
import poco
from benchmark.run import TASKS

MAIN = ["poco", "ogpo", "qc", "fql"]  # methods of the front page, in its order
DEFAULTS = vars(ogpo.Args()) | vars(poco.Args())
COLUMNS = ["step", "seconds", "success", "return"]  # of a result
STEP, SECONDS, SUCCESS, RETURN = range(4)
BEGIN = "<!-- results -->\n"
END = "<!-- /results -->"
LEGEND = """
## Results

Success in per cent. Clone and at the end: interquartile mean over the seeds, in brackets its 95 %
interval by bootstrap. Worst: the lowest evaluation of any seed, minus its clone's. To 90, 95 %:
environment steps and minutes from the clone on, median over the seeds, - where half of them or more
did not get there. Return: mean sum of an episode's rewards.
"""


@dataclass
class Args:
    results: Path = ROOT / "benchmark/results.csv"
    check: bool = False  # compare the tables, write nothing


# Results
def read_results(path):
    """Returns: by task and method, evaluations (seeds, evaluations, columns)."""
    runs = defaultdict(lambda: defaultdict(list))
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            evaluation = [float(row[name]) for name in COLUMNS]
            runs[row["task"], row["method"]][int(row["seed"])].append(evaluation)
    results = defaultdict(dict)
    for task, method in sorted(runs, key=order):
        by_seed = runs[task, method]
        seeds = [np.array(by_seed[seed]) for seed in sorted(by_seed)]
        for run in seeds:
            if not np.array_equal(run[:, STEP], seeds[0][:, STEP]):
                sys.exit(f"report.py: seeds of {method} in {task} were evaluated at other steps.")
        results[task][method] = np.array(seeds)
    return results


def order(key):
    """Sorts by the tasks of run.py, then the front page's methods first. Args: task, method."""
    task, method = key
    base = method.partition("+")[0]
    place = MAIN.index(base) if base in MAIN else len(MAIN)
    number = list(TASKS).index(task) if task in TASKS else len(TASKS)
    return number, task, place, method


def take_changes(results):
    """Takes the methods with one other number, method+option=value, out of the results, if there
    are several values, method is there, and the default is no 0, which a logarithmic axis lacks.
    Returns: by task, method and option, (value, the seeds' success at its end), the default
    first."""
    changes = {}
    for task, methods in results.items():
        single = [name for name in methods if name.count("+") == 1]
        values = Counter(name.partition("=")[0] for name in single)
        for name in list(methods):
            if name not in single or values[name.partition("=")[0]] < 2:
                continue
            method, _, change = name.partition("+")
            option, _, value = change.partition("=")
            default = DEFAULTS.get(option.replace("-", "_"))
            numeric = isinstance(default, float | int) and default != 0
            if not numeric or method not in methods:
                continue
            runs = methods.pop(name)
            base = methods[method][: len(runs)]  # the same seeds
            at = base[0, :, STEP] == runs[0, -1, STEP]
            start = (default, base[:, at, SUCCESS])
            points = changes.setdefault((task, method, option), [start])
            points.append((float(value), runs[:, -1, SUCCESS]))
    return changes


# Tables
def mean_and_interval(samples):
    """Interquartile mean over the seeds, ends of its interval. Args: (seeds, ...)."""
    def mean(samples, axis):
        return stats.trim_mean(samples, 0.25, axis)

    center = mean(samples, axis=0)
    if len(samples) == 1:
        nothing = np.full_like(center, math.nan)
        return center, nothing, nothing
    result = stats.bootstrap([samples], mean, method="percentile", rng=0)
    return center, *result.confidence_interval


def with_spaces(number):
    return f"{number:,.0f}".replace(",", " ")


def first(runs, level, column):
    """Median over the runs of a column in the first evaluation at this level, infinite if none."""
    firsts = []
    for run in runs:
        reached = run[run[:, SUCCESS] >= level, column]
        firsts.append(reached[0] if len(reached) > 0 else math.inf)
    return np.median(firsts)


def interval(values):
    """Text of the mean and its interval. Args: values (seeds,)."""
    mean, low, high = mean_and_interval(values)
    if math.isfinite(low):
        return f"**{mean:.0f}** [{low:.0f}, {high:.0f}]"
    return f"**{mean:.0f}**"


def steps_to(runs, level):
    step = first(runs, level, STEP)
    return with_spaces(step) if math.isfinite(step) else "-"


def minutes_to(runs, level):
    seconds = first(runs, level, SECONDS)
    return f"{seconds / 60:.1f}" if math.isfinite(seconds) else "-"


def long_row(method, runs):
    """Cells of a method's row. Args: runs (seeds, evaluations, columns)."""
    clone, _, _ = mean_and_interval(100 * runs[:, 0, SUCCESS])
    end = 100 * runs[:, -1, SUCCESS]
    mean_return, _, _ = mean_and_interval(runs[:, -1, RETURN])
    worst = (runs[:, 1:, SUCCESS] - runs[:, :1, SUCCESS]).min()
    levels = (0.9, 0.95)
    return {
        "method": f"`{method}`",
        "clone": f"{clone:.0f}",
        "steps": with_spaces(runs[0, -1, STEP]),
        "at the end": interval(end),
        "each seed": " ".join(f"{value:.0f}" for value in end),
        "return": f"{mean_return:.1f}",
        "worst": f"{round(100 * worst):+d}",
        "to 90, 95 %": ", ".join(steps_to(runs, level) for level in levels),
        "minutes": ", ".join(minutes_to(runs, level) for level in levels),
    }


def front_page(results):
    """Returns: the tasks of run.py that poco.py has run as it is now, but for those that the clone
    nearly solves."""
    tasks = []
    for task, methods in results.items():
        if task in TASKS and "poco" in methods and clone_success(methods) < 90:
            tasks.append(task)
    return tasks


def clone_success(methods):
    clone, _, _ = mean_and_interval(100 * methods["poco"][:, 0, SUCCESS])
    return clone


def short_row(task, methods, columns):
    """A task's cells: the clone, then for each column success at the end and steps to 90 %."""
    cells = {"task": task, "steps": with_spaces(methods["poco"][0, -1, STEP])}
    cells["clone"] = f"{clone_success(methods):.0f}"
    for method in columns:
        cells[f"`{method}`"] = ""
        if method in methods:
            runs = methods[method]
            success = interval(100 * runs[:, -1, SUCCESS])
            cells[f"`{method}`"] = f"{success}, {steps_to(runs, 0.9)}"
    return cells


def table(rows):
    titles = list(rows[0])
    lines = [f"| {' | '.join(titles)} |\n", f"|{'---|' * len(titles)}\n"]
    for cells in rows:
        lines.append(f"| {' | '.join(cells.values())} |\n")
    return "".join(lines)


def tables(results):
    """Returns: what belongs between the markers of each README."""
    suite = front_page(results)
    columns = [method for method in MAIN if any(method in results[task] for task in suite)]
    short = [short_row(task, results[task], columns) for task in suite]
    long = [LEGEND]
    for task, methods in results.items():
        if methods:
            rows = [long_row(method, runs) for method, runs in methods.items()]
            long.append(f"\n### {task}\n\n{table(rows)}")
    texts = {ROOT / "README.md": table(short)}
    texts[ROOT / "benchmark/README.md"] = "".join([*long, "\n"])
    return texts


# Pictures
def new_figure(rows, columns, height):
    """Returns: the figure and its axes (rows, columns)."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "success"  # the same file from the same results
    figure = Figure(figsize=(10, height * rows), layout="tight")
    return figure, figure.subplots(rows, columns, sharey=True, squeeze=False)


def draw(results, path):
    """An axis for each task, the clones at its left edge."""
    tasks = front_page(results)
    columns = min(len(tasks), 4)
    figure, axes = new_figure(math.ceil(len(tasks) / columns), columns, height=2.2)
    for axis, task in zip(axes.flat, tasks, strict=False):
        for index, method in enumerate(MAIN):
            if method not in results[task]:
                continue
            runs = results[task][method]
            mean, low, high = mean_and_interval(100 * runs[:, :, SUCCESS])
            x = runs[0, :, STEP] / 1000
            axis.plot(x, mean, color=f"C{index}", label=method)
            axis.fill_between(x, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
        axis.set_title(task, fontsize="medium")
        axis.set(ylim=(0, 102))
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(tasks) :]:
        axis.set_axis_off()
    axes[0, 0].legend(loc="lower right", fontsize="small")
    figure.supxlabel("online environment steps / 1000", fontsize="medium")
    figure.supylabel("success in per cent", fontsize="medium")
    figure.savefig(path, metadata={"Date": None})


def draw_changes(changes, path):
    """An axis for each setting: every seed, the mean and, as a line, the default."""
    figure, axes = new_figure(math.ceil(len(changes) / 4), 4, height=2.2)
    for axis, ((_, method, option), points) in zip(axes.flat, changes.items(), strict=False):
        default, _ = points[0]
        axis.axvline(default, color="gray", linewidth=0.8)
        means = []
        for value, success in points:
            percents = 100 * success.ravel()
            axis.plot([value] * len(percents), percents, ".", color="C0", alpha=0.5)
            means.append((value, percents.mean()))
        axis.plot(*zip(*sorted(means), strict=True))
        axis.set_title(f"{method} --{option}", fontsize="medium")
        axis.set(xscale="log", ylim=(0, 102))
        axis.grid(alpha=0.3)
    figure.supylabel("success in per cent", fontsize="medium")
    for axis in axes.flat[len(changes) :]:
        axis.set_axis_off()
    figure.savefig(path, metadata={"Date": None})


def main(args):
    results = read_results(args.results)
    changes = take_changes(results)
    stale = []
    for path, text in tables(results).items():
        before, _, rest = path.read_text().partition(BEGIN)
        old, end, after = rest.partition(END)
        if not end:
            sys.exit(f"report.py: {path} has no {BEGIN.strip()} followed by {END}.")
        if old != text:
            stale.append(str(path.relative_to(ROOT)))
        if not args.check:
            path.write_text(f"{before}{BEGIN}{text}{END}{after}")
    if args.check:
        if stale:
            names = " and ".join(stale)
            sys.exit(f"report.py: {names} are not the results; run python benchmark/report.py.")
        return
    draw(results, ROOT / "assets/success.svg")
    if changes:
        draw_changes(changes, ROOT / "assets/settings.svg")


if __name__ == "__main__":
    main(tyro.cli(Args))
