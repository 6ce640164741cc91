"""Demonstrations of Lift, Can and Square by scripted policies, in Robomimic's HDF5 layout.

    pip install robosuite==1.5.2 "mujoco==3.3.7" h5py    after requirements.txt
    python benchmark/robosuite_demos.py --task Lift --out runs/lift.hdf5
    python benchmark/robomimic_data.py runs/lift.hdf5 runs/lift.npz

The script grasps the object from above and starts again when it loses it.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import h5py
import numpy as np
import robosuite
import tyro
from robosuite.utils.control_utils import orientation_error
from robosuite.utils.transform_utils import euler2mat, quat2mat
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class Phase(NamedTuple):
    place: str  # to go to: object or goal
    height: float  # metres above it
    gripper: int  # 1 closes it, -1 opens it
    least_steps: int = 0
    near: float = 0.015  # the distance at which it ends


class Task(NamedTuple):
    phases: tuple
    pose: slice  # of position and quaternion in the observation's part "object"
    goal: tuple = (0, 0, 0)  # for the object
    handle: tuple = (0, 0, 0)  # where to grasp, in the object's frame
    turn: float = np.pi / 2  # makes no difference to the grasp


GRASP = (
    Phase("object", 0.1, -1, near=0.008),
    Phase("object", 0, -1),
    Phase("object", 0, 1, least_steps=12),
    Phase("object", 0.25, 1),
)
TO_BIN = (
    Phase("goal", 0.25, 1, near=0.03),
    Phase("goal", 0.1, 1, near=0.03),
    Phase("goal", 0.1, -1, least_steps=12, near=0.03),
    Phase("goal", 0.3, -1),
)
TO_PEG = (
    Phase("goal", 0.2, 1),
    Phase("goal", 0.2, 1, near=0.006),
    Phase("goal", 0.08, 1),
    Phase("goal", 0.08, -1),
)
TASKS = {
    "Lift": Task(GRASP, slice(0, 7)),
    "Can": Task(GRASP + TO_BIN, slice(7, 14), goal=(0.1975, 0.4025, 0.8)),
    "Square": Task(GRASP + TO_PEG, slice(7, 14), (0.23, 0.1, 0.82), (0.054, 0, 0), np.pi),
}


@dataclass
class Args:
    task: Literal["Lift", "Can", "Square"]
    out: Path  # .hdf5 file to write
    num_demos: int = 30  # episodes
    demo_noise: float = 0.2  # standard deviation of the noise on their actions
    seed: int = 1


class Script:
    """Goes through a task's phases, each with a target that stays where it was at its start."""
    def __init__(self, task, obs):
        self.task = TASKS[task]
        self.upright = quat2mat(obs["robot0_eef_quat"])
        self.enter(0, obs)

    def look(self, obs):
        """Returns: position and rotation of the object, position of its handle."""
        pose = obs["object"][self.task.pose]
        rotation = quat2mat(pose[3:])
        return pose[:3], rotation, pose[:3] + rotation @ self.task.handle

    def enter(self, index, obs):
        self.index = min(index, len(self.task.phases) - 1)
        self.phase = self.task.phases[self.index]
        self.steps = 0
        position, rotation, self.target = self.look(obs)
        self.rotation = self.upright
        if self.phase.place == "goal":
            self.target = self.task.goal + obs["robot0_eef_pos"] - position
        else:
            half = self.task.turn / 2
            yaw = np.arctan2(rotation[1, 0], rotation[0, 0])
            yaw = (yaw + half) % self.task.turn - half
            self.rotation = euler2mat([0, 0, yaw]) @ self.upright
        self.target = self.target + [0, 0, self.phase.height]

    def act(self, obs):
        gripper = obs["robot0_eef_pos"]
        _, _, handle = self.look(obs)
        lost = np.linalg.norm(handle - gripper) > 0.06
        near = np.linalg.norm(self.target - gripper) < self.phase.near
        if self.index > 2 and self.phase.gripper == 1 and lost:
            self.enter(0, obs)
        elif near and self.steps >= self.phase.least_steps:
            self.enter(self.index + 1, obs)
        self.steps += 1
        move = 40 * (self.target - gripper)
        turn = orientation_error(self.rotation, quat2mat(obs["robot0_eef_quat"]))
        return np.concatenate([move, turn, [self.phase.gripper]])


def demonstrate(env, task, seed, noise):
    """Returns: an episode's columns, by their names in the file, and its scene."""
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    robot = env.unwrapped
    sim = robot.env.sim
    scene = sim.model.get_xml()
    robot.reset_to(scene, sim.get_state().flatten())  # as when it is replayed
    script = Script(task, robot.obs)
    rows = []
    ended = False
    while not ended:
        row = {"states": robot.env.sim.get_state().flatten()}
        row |= {f"obs/{key}": value for key, value in robot.obs.items()}
        action = script.act(robot.obs) + noise * rng.standard_normal(7)
        row["actions"] = np.clip(action, -1, 1)
        _, _, terminated, truncated, info = env.step(row["actions"])
        row |= {f"next_obs/{key}": value for key, value in robot.obs.items()}
        ended = terminated or truncated
        row |= {"rewards": float(info["success"]), "dones": int(ended)}
        rows.append(row)
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}, scene


def main(args):
    env = gym.make(f"benchmark.robosuite_tasks:{args.task}-v0")
    first_seed = (2 * args.seed + 1) * 10**6
    lengths = []
    solved = 0
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(args.out, "w") as file:
        for i in trange(args.num_demos, file=sys.stderr):
            columns, scene = demonstrate(env, args.task, first_seed + i, args.demo_noise)
            demo = file.create_group(f"data/demo_{i}")
            for name, column in columns.items():
                demo[name] = column
            lengths.append(len(columns["actions"]))
            solved += columns["rewards"][-1]
            demo.attrs["model_file"] = scene
            demo.attrs["num_samples"] = lengths[-1]
        robot = env.unwrapped
        made_by = {"env_name": robot.name, "env_version": robosuite.__version__, "type": 1}
        made_by["env_kwargs"] = robot.options
        file["data"].attrs["env_args"] = json.dumps(made_by)
        file["data"].attrs["total"] = sum(lengths)
    print(f"success {solved / args.num_demos:.2f}, {np.mean(lengths):.0f} steps an episode")


if __name__ == "__main__":
    main(tyro.cli(Args))
