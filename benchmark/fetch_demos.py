"""Writes demos/: FetchReach, FetchPush and FetchPickAndPlace by scripted controllers, with noise.

    python benchmark/fetch_demos.py                           the files of demos/, to the letter
    python benchmark/fetch_demos.py --demo-noise 0.2 --out .  other ones
"""

from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import gymnasium_robotics
import numpy as np
import tyro
from tqdm import trange

gym.register_envs(gymnasium_robotics)


@dataclass
class Args:
    out: Path = Path(__file__).resolve().parent.parent / "demos"  # folder to write to
    num_demos: int = 200  # episodes of each task
    demo_noise: float = 0.4  # standard deviation of the noise on their actions
    seed: int = 1


def go(delta, gripper=-1.0):
    """Action of a proportional step along delta (metres); gripper 1 opens it, -1 closes it."""
    return np.clip([*(15 * delta), gripper], -1, 1)


def fetch_reach(obs):
    return go(obs[3:6] - obs[6:9])


def fetch_push(obs):
    """Swings over the object until in line behind it, pushes it along that line, rises."""
    to_goal = (obs[3:6] - obs[9:12]) * [1, 1, 0]  # from the object
    rel = -obs[12:15]  # from the object to the gripper
    distance = np.linalg.norm(to_goal)
    if distance < 0.03:
        return go(np.array([0, 0, 0.25 - rel[2]]))  # out of its way
    line = to_goal / distance
    along = rel @ line
    beside = np.linalg.norm((rel - along * line)[:2])
    wrong = max(beside - 0.01, 0) + max(along + 0.04, 0)
    ready = np.clip(1 - wrong / 0.02, 0, 1) * np.clip(1 - rel[2] / 0.03, 0, 1)  # smooth
    target = ready * (0.8 * to_goal + along * line) - (1 - ready) * 0.06 * line
    return go(target - rel + [0, 0, np.clip(3 * wrong, 0, 0.08)])


def fetch_pick_and_place(obs):
    """Hovers over the object, descends, grasps it, carries it to the goal."""
    to_goal = obs[3:6] - obs[9:12]
    rel = obs[12:15]  # from the gripper to the object
    width = obs[15] + obs[16]
    if np.linalg.norm(rel) < 0.04:  # between the fingers: close them, then carry
        return go(to_goal if width < 0.055 else rel, -1)
    hover = np.clip(4 * np.linalg.norm(rel[:2]) - 0.04, 0, 0.08)  # descend only when above it
    return go(rel + [0, 0, hover], 1)


TASKS = {
    "FetchReach-v4": fetch_reach,
    "FetchPush-v4": fetch_push,
    "FetchPickAndPlace-v4": fetch_pick_and_place,
}


def demonstrate(env, controller, seed, noise):
    """Returns: rows of poco.py's --dataset; the last only shows where the episode ended."""
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    rows = []
    ended = False
    while not ended:
        action = controller(obs) + noise * rng.standard_normal(4)
        action = np.clip(action, -1, 1)
        next_obs, reward, terminated, truncated, info = env.step(action)
        rows.append((obs, action, reward, 0, 0, info["is_success"]))
        obs = next_obs
        ended = terminated or truncated
    rows.append((obs, np.zeros(4), 0, terminated, truncated, info["is_success"]))
    return rows


def main(args):
    args.out.mkdir(parents=True, exist_ok=True)
    for env_id, controller in TASKS.items():
        env = gym.wrappers.FlattenObservation(gym.make(env_id))
        first_seed = (2 * args.seed + 1) * 10**6
        rows = []
        for seed in trange(first_seed, first_seed + args.num_demos, desc=env_id):
            rows += demonstrate(env, controller, seed, args.demo_noise)
        names = ("observations", "actions", "rewards", "terminals", "timeouts", "success")
        columns = [np.array(column, np.float32) for column in zip(*rows, strict=True)]
        np.savez_compressed(args.out / f"{env_id}.npz", **dict(zip(names, columns, strict=True)))
        ends = columns[3] + columns[4] > 0
        print(f"{env_id}: {ends.sum()} episodes, success {columns[5][ends].mean():.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
