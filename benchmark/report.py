"""Writes the tables of both READMEs and draws the pictures of assets/ from the CSVs of benchmark/run.py.

    pip install -r benchmark/requirements.txt && python benchmark/report.py
    python benchmark/report.py --check    fails where a README says something else
"""

import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ogpo
import poco

MAIN = "poco", "ogpo", "poco-weak", "ogpo-weak", "qc", "fql", "sac"  # methods of the front page, in its order
VARIANTS = "benchmark."  # environments of this folder, which the front page leaves out
DEFAULTS = vars(ogpo.Args()) | vars(poco.Args())
STEP, SECONDS, SUCCESS, RETURN = 0, 1, 3, 4  # columns of a result
SHORT = "environment", "method", "seeds", "clone", "steps", "at the end", "worst", "to 90, 95 %", "minutes"
LONG = "method", "clone", "steps", "at the end", "each seed", "return", "worst", "to 90, 95 %", "minutes"
BEGIN, END = "<!-- results -->\n", "<!-- /results -->"
LEGEND = """
## Results

Success in per cent, of single samples for the clone. Clone and at the end: interquartile mean over the seeds,
in brackets its 95 % interval by bootstrap of the seeds within each environment. Worst: the lowest evaluation
of any seed, minus its clone's. To 90, 95 %: environment steps and minutes from the clone on, median over the
seeds, - where half of them or more did not get there. Return: mean sum of an episode's rewards, -1 for
each step away from the goal (OGBench: for each cube).
"""


@dataclass
class Args:
    results: Path = ROOT / "benchmark/results"
    check: bool = False  # compare the tables, write nothing


def read_results(folder):
    """Returns: by environment and method, evaluations (seeds, evaluations, columns)."""
    runs = defaultdict(dict)
    for path in folder.glob("*.csv"):
        _, method, seed = path.stem.split("__")
        env = path.read_text().split("--env-id ")[1].split()[0]
        runs[env, method][int(seed)] = np.loadtxt(path, delimiter=",", skiprows=2, ndmin=2)

    def order(key):  # the front page's methods first
        base = key[1].partition("+")[0]
        return key[0], (*MAIN, base).index(base), key[1]

    results = defaultdict(dict)
    for env, method in sorted(runs, key=order):
        seeds = [run for _, run in sorted(runs[env, method].items())]
        if any(not np.array_equal(run[:, STEP], seeds[0][:, STEP]) for run in seeds):
            sys.exit(f"report.py: the seeds of {method} in {env} were not evaluated at the same steps.")
        results[env][method] = np.array(seeds)
    return results or sys.exit(f"report.py: there are no results in {folder}.")


def mean_and_interval(*strata):
    """Interquartile mean over the seeds, ends of its interval. Args: (seeds, ...) of each environment."""
    def mean(*samples, axis):
        return stats.trim_mean(np.concatenate(samples, axis), 0.25, axis)

    center = mean(*strata, axis=0)
    if min(map(len, strata)) == 1:
        return center, center * np.nan, center * np.nan
    return center, *stats.bootstrap(strata, mean, method="percentile", rng=0).confidence_interval


def first(runs, level, column, pattern):
    """Median over the runs of a column in the first evaluation at this level."""
    median = np.median([next((at[column] for at in run if at[SUCCESS] >= level), np.inf) for run in runs])
    return pattern.format(median).replace(",", " ") if np.isfinite(median) else "-"


def row(env, method, strata):
    """Cells by the titles of SHORT and LONG. Args: evaluations of an environment, or of each."""
    runs = [run * [1, 1 / 60, 1, 1, 1] for evaluations in strata for run in evaluations]
    clone, end = ([100 * evaluations[:, i, SUCCESS] for evaluations in strata] for i in (0, -1))
    mean, low, high = mean_and_interval(*end)
    steps, minutes = ([first(runs, level, column, pattern) for level in (0.9, 0.95)]
                      for column, pattern in ((STEP, "{:,.0f}"), (SECONDS, "{:.1f}")))
    return {
        "environment": env,
        "method": f"`{method}`",
        "seeds": f"{len(runs)}",
        "clone": f"{mean_and_interval(*clone)[0]:.0f}",
        "steps": ", ".join(dict.fromkeys(f"{runs[0, -1, STEP]:,.0f}".replace(",", " ") for runs in strata)),
        "at the end": f"**{mean:.0f}**" + (f" [{low:.0f}, {high:.0f}]" if np.isfinite(low) else ""),
        "each seed": " ".join(f"{value:.0f}" for value in end[0]) if len(end) == 1 else "",
        "return": f"{mean_and_interval(strata[0][:, -1, RETURN])[0]:.1f}" if len(strata) == 1 else "",
        "worst": f"{round(100 * min((run[1:, SUCCESS] - run[0, SUCCESS]).min() for run in runs)):+d}",
        "to 90, 95 %": ", ".join(steps),
        "minutes": ", ".join(minutes),
    }


def table(titles, rows):
    lines = [titles, *([cells[title] for title in titles] for cells in rows)]
    head, *body = [f"| {' | '.join(line)} |\n" for line in lines]
    return "".join([head, f"|{'---|' * len(titles)}\n", *body])


def comparisons(results):
    """The front page's environments with more than one of its methods."""
    return {env: methods for env, methods in results.items()
            if len(methods.keys() & {*MAIN}) > 1 and not env.startswith(VARIANTS)}


def take_changes(results):
    """Takes the methods with one other number, method+option=value, out of the results, if method is there
    and the default is no 0, which a logarithmic axis does not have.
    Returns: by environment, method and option, (value, the seeds' success at its end), the default first."""
    changes = {}
    for env, methods in results.items():
        for name in list(methods):
            method, _, change = name.partition("+")
            option, _, value = change.partition("=")
            default = DEFAULTS.get(option.replace("-", "_"))
            if default and isinstance(default, float | int) and "+" not in value and method in methods:
                runs, base = methods.pop(name), methods[method]
                at = base[0, :, STEP] == runs[0, -1, STEP]
                start = default, base[: len(runs), at, SUCCESS]  # the same seeds
                points = changes.setdefault((env, method, option), [start])
                points.append((float(value), runs[:, -1, SUCCESS]))
    return changes


def tables(results):
    """Returns: what belongs between the markers of each README."""
    rows = {env: [row(env, method, [runs]) for method, runs in results[env].items()] for env in results}
    main = [cells for env, group in rows.items() for cells in group
            if cells["method"].strip("`") in MAIN and not env.startswith(VARIANTS)]
    several = comparisons(results).values()
    everywhere = [method for method in MAIN if all(method in methods for methods in several)]
    if len(several) > 1 and len(everywhere) > 1:
        rows["all"] = [row("all", method, [methods[method] for methods in several]) for method in everywhere]
    parts = [f"\n### {env}\n\n{table(LONG, group)}" for env, group in rows.items() if group]
    long = "".join([LEGEND, *parts, "\n"])
    return {ROOT / "README.md": table(SHORT, main), ROOT / "benchmark/README.md": long}


def new_figure(rows, columns, height):
    """Returns: the figure and its axes (rows, columns)."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "success"  # the same file from the same results
    figure = Figure(figsize=(10, height * rows), layout="tight")
    return figure, figure.subplots(rows, columns, sharey=True, squeeze=False)


def draw(results, path):
    """A row of two axes for each comparison: against steps, and against minutes."""
    figure, axes = new_figure(len(results), 2, height=3.5)
    for pair, (env, methods) in zip(axes, results.items(), strict=True):
        for method in (method for method in MAIN if method in methods):
            mean, low, high = mean_and_interval(100 * methods[method][:, :, SUCCESS])
            for axis, column, unit in zip(pair, (STEP, SECONDS), (1000, 60), strict=True):
                x, color = methods[method][:, :, column].mean(0) / unit, f"C{MAIN.index(method)}"
                axis.plot(x, mean, color=color, label=method)
                axis.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
                axis.set(title=env, ylim=(0, 102))
                axis.grid(alpha=0.3)
        pair[0].set(xlabel="online environment steps / 1000", ylabel="success in per cent")
        pair[1].set(xlabel="minutes since the clone")
        pair[0].legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def draw_changes(changes, path):
    """An axis for each setting: every seed, the mean and, as a line, the default."""
    figure, axes = new_figure(math.ceil(len(changes) / 4), 4, height=2.2)
    for axis, ((_, method, option), points) in zip(axes.flat, changes.items(), strict=False):
        axis.axvline(points[0][0], color="gray", linewidth=0.8)
        for value, success in points:
            axis.plot([value] * success.size, 100 * success.ravel(), ".", color="C0", alpha=0.5)
        axis.plot(*zip(*sorted((value, 100 * success.mean()) for value, success in points), strict=True))
        axis.set_title(f"{method} --{option}", fontsize="medium")
        axis.set(xscale="log", ylim=(0, 102))
        axis.grid(alpha=0.3)
    figure.supylabel("success in per cent", fontsize="medium")
    for axis in axes.flat[len(changes) :]:
        axis.set_axis_off()
    figure.savefig(path, metadata={"Date": None})


def main(args):
    results, stale = read_results(args.results), []
    changes = take_changes(results)
    for path, text in tables(results).items():
        before, _, rest = path.read_text().partition(BEGIN)
        old, end, after = rest.partition(END)
        if not end:
            sys.exit(f"report.py: {path} has no {BEGIN.strip()} followed by {END}.")
        if old != text:
            stale.append(str(path.relative_to(ROOT)))
        if not args.check:
            path.write_text(f"{before}{BEGIN}{text}{END}{after}")
    if not args.check:
        draw(comparisons(results), ROOT / "assets/success.svg")
        if changes:
            draw_changes(changes, ROOT / "assets/settings.svg")
    elif stale:
        sys.exit(f"report.py: {' and '.join(stale)} are not the results; run python benchmark/report.py.")


if __name__ == "__main__":
    main(tyro.cli(Args))
