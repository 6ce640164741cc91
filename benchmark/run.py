"""Runs environments x methods x seeds, a process and a thread each, and writes a small CSV of every one.

    python benchmark/run.py --methods poco ogpo --seeds 1 2 3    goes on where it stopped, after any end
    python benchmark/run.py --methods poco+gamma=0.99 ogpo-weak  other arguments; from the weak clone
    python benchmark/run.py --dry-run                            print the commands of what is left
    python benchmark/run.py --slurm | sbatch                     each run a task of an array

The runs of an environment and seed start from the same clone, made first. A method is any script that takes
--env-id, --seed, --torch-threads, --policy, --critic-warmup, --total-timesteps and --resume and writes the
files of poco.Run.
"""

import csv
import fcntl
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import ogpo
import poco

CUBES = f"--dataset {ROOT}/runs/cube-double.npz --eval-interval 5000"  # a failure takes 500 steps
ENVIRONMENTS = {"ogbench:cube-double-singletask-task2-v0": CUBES}  # what to type for them, paths absolute
METHODS = {  # what follows python
    "clone": "poco.py --critic-warmup 0 --total-timesteps 1",
    "weak-clone": "poco.py --critic-warmup 0 --total-timesteps 1 --bc-steps 400",
    "poco": "poco.py",
    "poco-fixed": "poco.py --temperature 0.2 --clip-threshold 0.6",
    "poco-no-clip": "poco.py --clip-threshold 1e9",
    "poco-bc": "poco.py --posterior-coef 0",
    "poco-uniform": "poco.py --temperature 1e9",
    "ogpo": "ogpo.py",
    "ogpo-plain": "ogpo.py --success-coef 0 --no-conservative",
    "ogpo-success": "ogpo.py --no-conservative",
    "ogpo-conservative": "ogpo.py --success-coef 0",
    "ogpo-chi2": "ogpo.py --success-coef 0 --no-conservative --chi2-coef 0.1",
    "ogpo-plus-chi2": "ogpo.py --chi2-coef 0.1",
    "ogpo-variance": "ogpo.py --success-coef 0 --no-conservative --next-samples 2",
    "qc": "benchmark/qc.py",
    "fql": "benchmark/fql.py",
    "sac": "benchmark/sac.py",
}
DEFAULTS = vars(ogpo.Args()) | vars(poco.Args())
COLUMNS = "global_step", "seconds", "eval/ode_success", "eval/success", "eval/return"


@dataclass
class Args:
    envs: tuple[str, ...] = ("FetchPickAndPlace-v4", "FetchPush-v4")
    methods: tuple[str, ...] = ("poco", "ogpo", "ogpo-weak")
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    total_timesteps: int = DEFAULTS["total_timesteps"]  # with more, runs that have ended go on
    extra: str = ""  # to type for all, clones too: --extra="--eval-episodes 20"
    workers: int = 2  # runs at a time
    out: Path = Path("runs/benchmark")  # gets a folder for each run, with its log.txt
    results: Path = ROOT / "benchmark/results"  # gets a CSV for each run that has ended
    dry_run: bool = False  # print the commands of what is left
    slurm: bool = False  # print an array script
    only: int | None = None  # run this task of the array, after its clone


class Job:
    """A run in its own folder, to be started or resumed."""
    def __init__(self, args, seed, env, method):
        self.name = f"{env}__{method}__{seed}".replace("/", "-").replace(":", "-")
        self.folder, self.result = args.out.resolve() / self.name, args.results / f"{self.name}.csv"
        setting, *changes = method.split("+")
        base, self.clone = setting.removesuffix("-weak"), None
        poco.require(base in METHODS, f"there is no method {base}, only {', '.join(METHODS)}")
        self.words = METHODS[base].split() + [word for c in changes for word in f"--{c}".split("=", 1)]
        options = {"--env-id": env, "--seed": seed, "--torch-threads": 1}
        if not base.endswith("clone"):
            self.clone = Job(args, seed, env, "clone" if base == setting else "weak-clone")
            options["--policy"] = f"{self.clone.folder}/runs/*/clone.pt"
            options["--critic-warmup"] = DEFAULTS["critic_warmup"]  # what is not typed is as in the clone
            options["--total-timesteps"] = args.total_timesteps
        self.words += [str(word) for pair in options.items() if pair[0] not in self.words for word in pair]
        self.words += shlex.split(f"{ENVIRONMENTS.get(env, '')} {args.extra}")

    def files(self, name):
        return sorted(self.folder.glob(f"runs/*/{name}"))

    def command(self):
        clones = self.clone.files("clone.pt") if self.clone else []
        words = [str(clones[0]) if clones and word.endswith("*/clone.pt") else word for word in self.words]
        resume = [word for file in self.files("checkpoint.pt") for word in ("--resume", str(file.parent))]
        return [sys.executable, str(ROOT / words[0]), *words[1:], *resume]

    def rows(self):
        with open((self.files("metrics.csv") or [os.devnull])[0]) as file:
            return list(csv.DictReader(file))

    def done(self):
        total = int(self.words[self.words.index("--total-timesteps") + 1])
        return any(int(row["global_step"]) >= total for row in self.rows())

    def start(self):
        """Returns: the process, None if the run is done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "log.txt", "a") as log:
            if not self.done():
                print(time.strftime("%H:%M"), self.name, flush=True)
            fcntl.flock(log, fcntl.LOCK_EX)  # inherited: waits for a process that outlived its run.py
            if self.done():
                return None
            print("\n$", *self.command(), file=log, flush=True)
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            return subprocess.Popen(self.command(), cwd=self.folder, env=env, stdout=log, stderr=log)

    def error(self, process):
        log = (self.folder / "log.txt").read_text(errors="replace").rpartition("\n$ ")[2]
        named = re.findall(r"(?:\w+\.py|[\w.]+Error|\w+ options): [^│\n]*", log)
        reason = named[-1].strip() if named else f"exit status {process.returncode}"
        return f"{reason} ({self.folder}/log.txt)"

    def write_result(self):
        """The command, what else is not a default, and the evaluations, the first of which is the clone's."""
        saved = poco.read_file(self.files("policy.pt")[0])[1]["args"].items()
        others = [f"{name}={value}" for name, value in saved
                  if value != DEFAULTS.get(name) and f"--{name.replace('_', '-')}" not in self.words]
        command = " ".join(["# python", *self.words, *others]).replace(f"{ROOT}/", "")
        rows = [[row["global_step"], *(f"{float(row[name]):.5g}" for name in COLUMNS[1:])]
                for row in self.rows() if row["eval/success"]]
        self.result.parent.mkdir(parents=True, exist_ok=True)
        self.result.write_text("\n".join([command, *map(",".join, [COLUMNS, *rows]), ""]))


def work(queue, workers):
    """Runs the jobs. Returns: why some failed, by name."""
    running, finished, failed = {}, set(), {}
    try:
        while True:
            ready = [job for job in queue if not job.clone or job.clone.name in finished]
            for job in ready[: workers - len(running)]:
                queue.remove(job)
                running[job] = job.start()
            if not running:
                return failed | {job.name: "its clone failed" for job in queue}
            time.sleep(0.1)
            for job, process in [(j, p) for j, p in running.items() if p is None or p.poll() is not None]:
                del running[job]
                if not job.done():
                    failed[job.name] = job.error(process)
                elif job.clone:
                    job.write_result()
                else:
                    finished.add(job.name)
    finally:
        for process in filter(None, running.values()):
            process.terminate()
            process.wait()


def main(args):
    poco.require(args.workers > 0, "--workers is below 1.")
    jobs = [Job(args, *key) for key in itertools.product(args.seeds, args.envs, args.methods)]
    if args.slurm:
        words = [sys.executable, str(Path(__file__).resolve()), *(w for w in sys.argv[1:] if w != "--slurm")]
        print(f"#!/bin/bash\n#SBATCH --array=0-{len(jobs) - 1}\n#SBATCH --cpus-per-task=1\ncd {Path.cwd()}")
        return print(shlex.join(words), "--only $SLURM_ARRAY_TASK_ID")
    jobs = jobs if args.only is None else [jobs[args.only]]
    queue = list({job.name: job for job in [job.clone for job in jobs if job.clone] + jobs}.values())
    if args.dry_run:
        left = [f"mkdir -p {job.folder} && cd {job.folder} && {' '.join(job.command())}\n"
                for job in queue if not job.done()]
        return print(*left, sep="", end="")
    failed = work(queue, args.workers)
    print(*(f"{name} failed: {reason}\n" for name, reason in failed.items()), sep="", end="")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(tyro.cli(Args))
    except KeyboardInterrupt:
        sys.exit(130)
    except poco.UserError as error:
        print(f"run.py: {error}", file=sys.stderr)
        sys.exit(2)
