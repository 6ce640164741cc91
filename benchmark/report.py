"""Writes the tables of both READMEs and draws assets/*.svg from the CSVs of benchmark/run.py.

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

MAIN = ["poco", "ogpo", "poco-weak", "ogpo-weak", "qc", "fql", "sac"]  # in the front page's order
VARIANTS = "benchmark."  # environments of this folder, which the front page leaves out
DEFAULTS = vars(ogpo.Args()) | vars(poco.Args())
COLUMNS = ["global_step", "seconds", "eval/success", "eval/return"]  # of a result
STEP, SECONDS, SUCCESS, RETURN = range(4)
SHORT = ["environment", "method", "seeds", "clone", "steps", "at the end", "worst"]
SHORT += ["to 90, 95 %", "minutes"]
LONG = ["method", "clone", "steps", "at the end", "each seed", "return", "worst"]
LONG += ["to 90, 95 %", "minutes"]
BEGIN = "<!-- results -->\n"
END = "<!-- /results -->"
LEGEND = """
## Results

Success in per cent, of single samples for the clone. Clone and at the end: interquartile mean over
the seeds, in brackets its 95 % interval by bootstrap of the seeds within each environment. Worst:
the lowest evaluation of any seed, minus its clone's. To 90, 95 %: environment steps and minutes
from the clone on, median over the seeds, - where half of them or more did not get there. Return:
mean sum of an episode's rewards, -1 for each step away from the goal (OGBench: for each cube).
"""


@dataclass
class Args:
    results: Path = ROOT / "benchmark/results"
    check: bool = False  # compare the tables, write nothing


# Results
def read_results(folder):
    """Returns: by environment and method, evaluations (seeds, evaluations, columns)."""
    runs = defaultdict(dict)
    for path in folder.glob("*.csv"):
        _, method, seed = path.stem.split("__")
        command, titles, *_ = path.read_text().splitlines()
        env = command.split("--env-id ")[1].split()[0]
        places = [titles.split(",").index(title) for title in COLUMNS]  # older files have more
        evaluations = np.loadtxt(path, delimiter=",", skiprows=2, usecols=places, ndmin=2)
        runs[env, method][int(seed)] = evaluations
    if not runs:
        sys.exit(f"report.py: there are no results in {folder}.")

    results = defaultdict(dict)
    for env, method in sorted(runs, key=order):
        by_seed = runs[env, method]
        seeds = [by_seed[seed] for seed in sorted(by_seed)]
        steps = seeds[0][:, STEP]
        for run in seeds:
            if not np.array_equal(run[:, STEP], steps):
                sys.exit(f"report.py: seeds of {method} in {env} were evaluated at other steps.")
        results[env][method] = np.array(seeds)
    return results


def order(key):
    """Sorts by environment, then the front page's methods first. Args: environment, method."""
    env, method = key
    base = method.partition("+")[0]
    place = MAIN.index(base) if base in MAIN else len(MAIN)
    return env, place, method


def take_changes(results):
    """Takes the methods with one other number, method+option=value, out of the results, if method
    is there and the default is no 0, which a logarithmic axis does not have.
    Returns: by environment, method and option, (value, the seeds' success at its end), the default
    first."""
    changes = {}
    for env, methods in results.items():
        for name in list(methods):
            method, _, change = name.partition("+")
            option, _, value = change.partition("=")
            default = DEFAULTS.get(option.replace("-", "_"))
            numeric = isinstance(default, float | int) and default != 0
            if not numeric or "+" in value or method not in methods:
                continue
            runs = methods.pop(name)
            base = methods[method][: len(runs)]  # the same seeds
            at = base[0, :, STEP] == runs[0, -1, STEP]
            start = (default, base[:, at, SUCCESS])
            points = changes.setdefault((env, method, option), [start])
            points.append((float(value), runs[:, -1, SUCCESS]))
    return changes


def is_main(env, method):
    return method in MAIN and not env.startswith(VARIANTS)


def comparisons(results):
    """The front page's environments with more than one of its methods."""
    several = {}
    for env, methods in results.items():
        if sum(is_main(env, method) for method in methods) > 1:
            several[env] = methods
    return several


# Tables
def mean_and_interval(*strata):
    """Interquartile mean over the seeds, ends of its interval.
    Args: (seeds, ...) of each environment."""
    def mean(*samples, axis):
        return stats.trim_mean(np.concatenate(samples, axis), 0.25, axis)

    center = mean(*strata, axis=0)
    if min(map(len, strata)) == 1:
        nothing = np.full_like(center, math.nan)
        return center, nothing, nothing
    result = stats.bootstrap(strata, mean, method="percentile", rng=0)
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


def row(env, method, strata):
    """Cells by the titles of SHORT and LONG. Args: evaluations of an environment, or of each."""
    runs = [run for evaluations in strata for run in evaluations]
    clone = [100 * evaluations[:, 0, SUCCESS] for evaluations in strata]
    end = [100 * evaluations[:, -1, SUCCESS] for evaluations in strata]
    last_steps = [with_spaces(evaluations[0, -1, STEP]) for evaluations in strata]
    worst = min((run[1:, SUCCESS] - run[0, SUCCESS]).min() for run in runs)
    clone_mean, _, _ = mean_and_interval(*clone)
    mean, low, high = mean_and_interval(*end)

    at_the_end = f"**{mean:.0f}**"
    if math.isfinite(low):
        at_the_end += f" [{low:.0f}, {high:.0f}]"
    steps = []
    minutes = []
    for level in (0.9, 0.95):
        step = first(runs, level, STEP)
        seconds = first(runs, level, SECONDS)
        steps.append(with_spaces(step) if math.isfinite(step) else "-")
        minutes.append(f"{seconds / 60:.1f}" if math.isfinite(seconds) else "-")
    each_seed = ""
    mean_return = ""
    if len(strata) == 1:
        each_seed = " ".join(f"{value:.0f}" for value in end[0])
        mean_return = f"{mean_and_interval(strata[0][:, -1, RETURN])[0]:.1f}"
    return {
        "environment": env,
        "method": f"`{method}`",
        "seeds": f"{len(runs)}",
        "clone": f"{clone_mean:.0f}",
        "steps": ", ".join(dict.fromkeys(last_steps)),
        "at the end": at_the_end,
        "each seed": each_seed,
        "return": mean_return,
        "worst": f"{round(100 * worst):+d}",
        "to 90, 95 %": ", ".join(steps),
        "minutes": ", ".join(minutes),
    }


def table(titles, rows):
    lines = [f"| {' | '.join(titles)} |\n", f"|{'---|' * len(titles)}\n"]
    for cells in rows:
        chosen = [cells[title] for title in titles]
        lines.append(f"| {' | '.join(chosen)} |\n")
    return "".join(lines)


def tables(results):
    """Returns: what belongs between the markers of each README."""
    short = []
    long = [LEGEND]
    for env, methods in results.items():
        rows = {method: row(env, method, [runs]) for method, runs in methods.items()}
        short += [cells for method, cells in rows.items() if is_main(env, method)]
        if rows:
            long.append(f"\n### {env}\n\n{table(LONG, rows.values())}")
    several = comparisons(results).values()
    everywhere = [method for method in MAIN if all(method in methods for methods in several)]
    if len(several) > 1 and len(everywhere) > 1:
        rows = []
        for method in everywhere:
            rows.append(row("all", method, [methods[method] for methods in several]))
        long.append(f"\n### all\n\n{table(LONG, rows)}")
    texts = {ROOT / "README.md": table(SHORT, short)}
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
    """A row of two axes for each comparison: against steps, and against minutes."""
    figure, axes = new_figure(len(results), 2, height=3.5)
    for (by_step, by_minute), (env, methods) in zip(axes, results.items(), strict=True):
        for index, method in enumerate(MAIN):
            if method not in methods:
                continue
            runs = methods[method]
            mean, low, high = mean_and_interval(100 * runs[:, :, SUCCESS])
            x = {by_step: runs[0, :, STEP] / 1000, by_minute: runs[:, :, SECONDS].mean(0) / 60}
            for axis in (by_step, by_minute):
                axis.plot(x[axis], mean, color=f"C{index}", label=method)
                axis.fill_between(x[axis], low, high, color=f"C{index}", alpha=0.15, linewidth=0)
                axis.set(title=env, ylim=(0, 102))
                axis.grid(alpha=0.3)
        by_step.set(xlabel="online environment steps / 1000", ylabel="success in per cent")
        by_minute.set(xlabel="minutes since the clone")
        by_step.legend(loc="lower right")
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
    draw(comparisons(results), ROOT / "assets/success.svg")
    if changes:
        draw_changes(changes, ROOT / "assets/settings.svg")


if __name__ == "__main__":
    main(tyro.cli(Args))
