"""Makes an .npz for --dataset of Robomimic's HDF5 files, after checking that they fit the task.

    pip install robosuite==1.5.2 "mujoco==3.3.7" h5py    after requirements.txt
    python benchmark/robomimic_data.py low_dim_v15.hdf5 square.npz
    python poco.py --env-id benchmark.robosuite_tasks:Square-v0 --dataset square.npz

Files must be of robosuite 1.5 and have sparse rewards. An episode ends with the step that solves
the task; one that never does ends with a timeout. The first step of each demonstration is left
out: its observation has the pose of the object relative to the gripper from before the reset.
"""

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import poco


@dataclass
class Args:
    file: tyro.conf.Positional[Path]  # .hdf5 file to read
    out: tyro.conf.Positional[Path]  # .npz file to write
    mask: str | None = None  # the filter key of the demonstrations to take, as 20_percent


def same(name, theirs, ours):
    poco.require(theirs == ours, f"{name} is {theirs} in it, {ours} in the task")


def make_env(made_by):
    """Returns: the environment that a file's env_args describe. Raises: UserError."""
    found = importlib.util.find_spec("robosuite")
    poco.require(found, 'to check it takes pip install robosuite==1.5.2 "mujoco==3.3.7"')
    from benchmark.robosuite_tasks import ARM, TASKS
    tasks = {name: task for task, (name, _, _) in TASKS.items()}
    name = made_by["env_name"]
    known = ", ".join(tasks)
    poco.require(name in tasks, f"its task is {name}, not one of {known}")
    version = made_by.get("env_version", "before 1.5")
    fits = version.startswith("1.5")
    poco.require(fits, f"it is of robosuite {version}: take Robomimic's low_dim_v15.hdf5")
    env = gym.make(f"{tasks[name]}-v0").unwrapped
    theirs = made_by["env_kwargs"]
    theirs |= theirs["controller_configs"]["body_parts"]["right"]
    if len(theirs["robots"]) == 1:
        theirs["input_ref_frame"] = "world"  # has the same axes as its base
    ours = env.options | ARM
    for name in ("robots", "control_freq", "reward_shaping", *ARM):
        value = theirs.get(name, ours[name])
        same(name, value, ours[name])
    return env


def check(demo, env):
    """Raises: UserError if a demonstration's observations are not those of the environment."""
    _, size = demo["actions"].shape
    same("the number of actions", size, len(env.action_space.low))
    scene = demo.attrs["model_file"]
    env.reset_to(scene, *demo["states"][:2])
    for key, ours in env.obs.items():
        poco.require(key in demo["obs"], f"it has no observation {key}")
        theirs = demo["obs"][key][1]
        same(f"the size of {key}", len(theirs), len(ours))
        close = np.allclose(theirs, ours, atol=0.01)
        poco.require(close, f"{key} is {theirs} in it, {ours} in the same state of the task")


def read(demo, keys):
    """Returns: a demonstration's columns, up to the step that solves the task."""
    success = demo["rewards"][1:] > 0
    if success.any():
        success = success[: success.argmax() + 1]
    rows = slice(1, len(success) + 1)
    last = np.arange(len(success)) == len(success) - 1
    return {
        "observations": np.hstack([demo["obs"][key][rows] for key in keys]),
        "actions": demo["actions"][rows],
        "rewards": success - 1.0,
        "terminals": success,
        "timeouts": last & ~success,
        "next_observations": np.hstack([demo["next_obs"][key][rows] for key in keys]),
        "success": success,
    }


def main(args):
    with poco.explained(f"{args.file} cannot be used"), h5py.File(args.file) as file:
        data = file["data"]
        made_by = json.loads(data.attrs["env_args"])
        env = make_env(made_by)
        names = list(data)
        if args.mask:
            poco.require(f"mask/{args.mask}" in file, f"it has no mask {args.mask}")
            names = file["mask"][args.mask].asstr()[:]
        check(data[names[0]], env)
        demos = [read(data[name], env.keys) for name in names]
    columns = {}
    for name in demos[0]:
        column = np.concatenate([demo[name] for demo in demos])
        columns[name] = np.float32(column)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **columns)
    success = columns["success"].sum() / len(demos)
    print(f"{len(demos)} episodes, success {success:.2f}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except poco.UserError as error:
        print(f"robomimic_data.py: {error}", file=sys.stderr)
        sys.exit(2)
