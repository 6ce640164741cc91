"""Demonstrations for OGBench's cube tasks by that package's own scripted oracle, for --dataset.

    pip install ogbench "mujoco==3.11.0"
    python benchmark/ogbench_demos.py --out runs/cube-double.npz
    python poco.py --env-id ogbench:cube-double-singletask-task2-v0 --dataset runs/cube-double.npz

The oracle moves one cube. It gets the next that is not at its goal once it has let go of the last.
"""

from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
from tqdm import trange


@dataclass
class Args:
    out: Path  # .npz file to write
    env_id: str = "ogbench:cube-double-singletask-task2-v0"
    num_demos: int = 200  # episodes
    demo_noise: float = 0.4  # standard deviation of the noise on their actions
    seed: int = 1


def cubes_and_goals(env):
    """Positions (n, 3) of the cubes and of their goals."""
    robot = env.unwrapped
    data = robot._data
    cubes = [data.joint(f"object_joint_{i}").qpos[:3] for i in range(robot._num_cubes)]
    goals = data.mocap_pos[robot._cube_target_mocap_ids]
    return np.array(cubes), goals.reshape(-1, 3)


def demonstrate(env, seed, noise):
    """Returns: an episode's rows of poco.py's --dataset."""
    obs, info = env.reset(seed=seed)
    rng = np.random.default_rng(seed)
    np.random.seed(seed)  # the oracle's
    oracle = CubeMarkovOracle(env=env)
    cube = None  # which the oracle moves
    rows = []
    ended = False
    while not ended:
        cubes, goals = cubes_and_goals(env)
        far = np.linalg.norm(cubes - goals, axis=1) > 0.03
        low = info["proprio/effector_pos"][2] < 0.16
        busy = cube is not None and (low or far[cube])
        if far.any() and not busy:
            cube = int(far.argmax())
            oracle.reset(obs, info)
        block = cube or 0
        target = {
            "privileged/target_block": block,
            "privileged/target_block_pos": goals[block],
            "privileged/target_block_yaw": [0.0],
        }
        action = oracle.select_action(obs, info | target)
        action = action + noise * rng.standard_normal(len(action))
        action = np.clip(action, -1, 1)
        next_obs, reward, terminated, truncated, info = env.step(action)
        rows.append((obs, action, reward, terminated, truncated, next_obs, info["success"]))
        obs = next_obs
        ended = terminated or truncated
    return rows


def main(args):
    env = gym.make(args.env_id)
    first_seed = (2 * args.seed + 1) * 10**6
    rows = []
    for seed in trange(first_seed, first_seed + args.num_demos):
        rows += demonstrate(env, seed, args.demo_noise)
    names = ["observations", "actions", "rewards", "terminals", "timeouts"]
    names += ["next_observations", "success"]
    columns = {}
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        array = np.array(column)
        image = array.dtype == np.uint8
        columns[name] = array if image else array.astype(np.float32)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **columns)
    ends = columns["terminals"] + columns["timeouts"] > 0
    success = columns["success"][ends].mean()
    print(f"success {success:.2f}, {len(rows) / ends.sum():.0f} steps an episode")


if __name__ == "__main__":
    main(tyro.cli(Args))
