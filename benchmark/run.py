"""Runs tasks x methods x seeds, a process and a thread each, and adds their curves to one CSV.

    python benchmark/run.py --methods poco ogpo --seeds 1 2 3    goes on where it stopped
    python benchmark/run.py --tasks push --methods poco+tau=0.1  one task, another argument
    python benchmark/run.py --dry-run                            print the commands of what is left
    python benchmark/run.py --slurm | sbatch                     each run a task of an array

The runs of a task and seed start from the same clone, made first. A method is any script
that takes --env-id, --seed, --torch-threads, --policy, --critic-warmup, --total-timesteps and
--resume and writes the files of poco.Run.
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

DATA = f"--dataset {ROOT}/runs"
METAWORLD = "--env-id benchmark.metaworld_tasks"
ROBOSUITE = "--env-id benchmark.robosuite_tasks"
CAMERA = "--env-id benchmark.camera_tasks"
# small batches, because an update with images is slow; a small discount for the dense reward
REACH = "--batch-size 64 --bc-steps 3000 --critic-warmup 500 --gamma 0.8 --eval-episodes 50"
TASKS = {  # what to type for them, paths absolute; benchmark/README.md says how to make the data
    "pick-and-place": "--env-id FetchPickAndPlace-v4 --num-demos 20",
    "push": "--env-id FetchPush-v4 --num-demos 50",
    "peg-insert-side": f"{METAWORLD}:peg-insert-side-v0 {DATA}/peg-insert-side.npz",
    "assembly": f"{METAWORLD}:assembly-v0 {DATA}/assembly.npz",
    "three-tasks": f"{METAWORLD}:three-tasks-v0 {DATA}/three-tasks.npz",
    "cube-double": f"--env-id ogbench:cube-double-singletask-task2-v0 {DATA}/cube-double.npz"
    " --eval-episodes 50",
    "scene": "--env-id ogbench:scene-singletask-task1-v0"
    " --dataset ogbench:scene-play-singletask-task1-v0"
    " --critic-warmup 20000 --best-of-n 8 --eval-episodes 50",  # Q finds the task in the play
    "lift": f"{ROBOSUITE}:Lift-v0 {DATA}/lift.npz --eval-episodes 50",
    "can": f"{ROBOSUITE}:Can-v0 {DATA}/can.npz --eval-episodes 50",
    "can-few": f"{ROBOSUITE}:Can-v0 {DATA}/can.npz --num-demos 10 --eval-episodes 50",
    "square": f"{ROBOSUITE}:Square-v0 {DATA}/square.npz --eval-episodes 50",
    "reach-camera": f"{CAMERA}:FetchReachCamera-v0 {DATA}/reach-camera.npz {REACH} --num-demos 15",
    "reach-camera-few": f"{CAMERA}:FetchReachCamera-v0 {DATA}/reach-camera.npz {REACH}"
    " --num-demos 10",
    "reach-vectors": f"{CAMERA}:FetchReachVectors-v0 {DATA}/reach-vectors.npz {REACH}"
    " --num-demos 15",
    "reach-from-nothing": "--env-id FetchReach-v4 --dataset none --eval-episodes 50",
    "drawer-open-from-nothing": f"{METAWORLD}:drawer-open-dense-v0 --dataset none"
    " --eval-episodes 50",
}
METHODS = {  # what follows python
    "clone": "poco.py --critic-warmup 0 --total-timesteps 1 --eval-episodes 1",
    "poco": "poco.py",
    "poco-fixed": "poco.py --temperature 0.2 --clip-threshold 0.6",
    "poco-no-clip": "poco.py --clip-threshold 1e9",
    "poco-bc": "poco.py --posterior-coef 0",
    "poco-uniform": "poco.py --temperature 1e9",
    "poco-single": "poco.py --best-of-n 1",
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
COLUMNS = ("task", "method", "seed", "step", "seconds", "success", "return")


@dataclass
class Args:
    tasks: tuple[str, ...] = tuple(TASKS)
    methods: tuple[str, ...] = ("poco", "ogpo", "fql", "qc")
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    total_timesteps: int = 20_000  # with more, runs that have ended go on
    extra: str = ""  # to type for all, clones too: --extra="--eval-interval 5000"
    workers: int = 2  # runs at a time
    out: Path = Path("runs/benchmark")  # gets a folder for each run, with its log.txt
    results: Path = ROOT / "benchmark/results.csv"  # gets the evaluations of runs that ended
    dry_run: bool = False  # print the commands of what is left
    slurm: bool = False  # print an array script
    only: int | None = None  # run this task of the array, after its clone


class Job:
    """A run in its own folder, to be started or resumed."""
    def __init__(self, args, seed, task, method):
        poco.require(task in TASKS, f"there is no task {task}, only {', '.join(TASKS)}")
        self.key = [task, method, str(seed)]
        self.name = "__".join(self.key)
        self.folder = args.out.resolve() / self.name
        self.results = args.results
        base, *changes = method.split("+")
        poco.require(base in METHODS, f"there is no method {base}, only {', '.join(METHODS)}")
        script, *own = METHODS[base].split()
        self.words = [script, *shlex.split(f"{TASKS[task]} {args.extra}"), *own]
        for change in changes:
            self.words += f"--{change}".split("=", 1)
        self.clone = None
        options = {"--seed": seed, "--torch-threads": 1}
        if base != "clone" and "--dataset none" not in TASKS[task]:
            self.clone = Job(args, seed, task, "clone")
            options["--policy"] = f"{self.clone.folder}/runs/*/clone.pt"
            for name in ("critic_warmup", "eval_episodes"):  # other arguments are the clone's
                options[f"--{name.replace('_', '-')}"] = DEFAULTS[name]
        if base != "clone":
            options["--total-timesteps"] = args.total_timesteps
        for name, value in options.items():
            if name not in self.words:  # what a task or method has counts
                self.words += [name, str(value)]

    def files(self, name):
        return sorted(self.folder.glob(f"runs/*/{name}"))

    def command(self):
        words = self.words
        clones = self.clone.files("clone.pt") if self.clone else []
        if clones:
            pattern = f"{self.clone.folder}/runs/*/clone.pt"
            words = [str(clones[0]) if word == pattern else word for word in words]
        resume = []
        for checkpoint in self.files("checkpoint.pt"):
            resume += ["--resume", str(checkpoint.parent)]
        return [sys.executable, str(ROOT / words[0]), *words[1:], *resume]

    def rows(self):
        tables = self.files("metrics.csv")
        if not tables:
            return []
        with open(tables[0]) as file:
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
            fcntl.flock(log, fcntl.LOCK_EX)  # inherited: waits for one that outlived its run.py
            if self.done():
                return None
            command = self.command()
            print("\n$", *command, file=log, flush=True)
            env = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_MININTERVAL": "60"}
            return subprocess.Popen(command, cwd=self.folder, env=env, stdout=log, stderr=log)

    def error(self, process):
        log = (self.folder / "log.txt").read_text(errors="replace")
        _, _, last_run = log.rpartition("\n$ ")
        named = re.findall(r"(?:\w+\.py|[\w.]+Error|\w+ options): [^│\n]*", last_run)
        reason = named[-1].strip() if named else f"exit status {process.returncode}"
        return f"{reason} ({self.folder}/log.txt)"

    def write_result(self):
        """Puts the evaluations, first the clone's, in place of older ones in the CSV."""
        rows = []
        for row in self.rows():
            if row["eval/success"]:
                names = ("seconds", "eval/success", "eval/return")
                values = [f"{float(row[name]):.5g}" for name in names]
                rows.append([*self.key, row["global_step"], *values])
        with open(self.results, "a+", newline="") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            others = [row for row in csv.reader(file) if row[:3] != self.key]
            rows += others[1:]  # without the titles
            rows.sort(key=lambda row: (*row[:2], int(row[2]), int(row[3])))
            file.truncate(0)
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


def next_job(queue, finished):
    """Returns: the first job whose clone is there, None if there is none."""
    for job in queue:
        if job.clone is None or job.clone.name in finished:
            return job
    return None


def work(queue, workers):
    """Runs the jobs. Returns: why some failed, by name."""
    running = {}
    finished = set()
    failed = {}
    try:
        while True:
            job = next_job(queue, finished)
            while job and len(running) < workers:
                queue.remove(job)
                running[job] = job.start()
                job = next_job(queue, finished)
            if not running:
                return failed | {job.name: "its clone failed" for job in queue}
            time.sleep(0.1)
            for job, process in list(running.items()):
                if process and process.poll() is None:
                    continue
                del running[job]
                if not job.done():
                    failed[job.name] = job.error(process)
                    continue
                finished.add(job.name)
                if job.key[1] != "clone":
                    job.write_result()
    finally:
        for process in running.values():
            if process:
                process.terminate()
                process.wait()


def print_slurm(num_jobs):
    """An array script that runs this command, a job a task."""
    words = [sys.executable, str(Path(__file__).resolve())]
    words += [word for word in sys.argv[1:] if word != "--slurm"]
    print("#!/bin/bash")
    print(f"#SBATCH --array=0-{num_jobs - 1}")
    print("#SBATCH --cpus-per-task=1")
    print(f"cd {Path.cwd()}")
    print(shlex.join(words), "--only $SLURM_ARRAY_TASK_ID")


def main(args):
    poco.require(args.workers > 0, "--workers is below 1.")
    keys = itertools.product(args.seeds, args.tasks, args.methods)
    jobs = [Job(args, *key) for key in keys]
    if args.slurm:
        return print_slurm(len(jobs))
    if args.only is not None:
        jobs = [jobs[args.only]]
    clones = [job.clone for job in jobs if job.clone]
    by_name = {job.name: job for job in clones + jobs}  # a clone serves several
    queue = list(by_name.values())
    if args.dry_run:
        for job in queue:
            if not job.done():
                print(f"mkdir -p {job.folder} && cd {job.folder} && {' '.join(job.command())}")
        return None
    failed = work(queue, args.workers)
    for name, reason in failed.items():
        print(f"{name} failed: {reason}")
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
