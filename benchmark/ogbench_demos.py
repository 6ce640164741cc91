"""Demonstrations for OGBench's cube tasks by that package's own scripted oracle, as a file for --dataset.

    pip install ogbench "mujoco==3.11.0"
    python benchmark/ogbench_demos.py --out runs/cube-double.npz
    python poco.py --env-id ogbench:cube-double-singletask-task2-v0 --dataset runs/cube-double.npz

The oracle moves one cube. It gets the next that is not at its goal once it has let go of the last.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
from tqdm import trange

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import poco


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
    cubes = [robot._data.joint(f"object_joint_{i}").qpos[:3] for i in range(robot._num_cubes)]
    return np.array(cubes), robot._data.mocap_pos[robot._cube_target_mocap_ids].reshape(-1, 3)


def demonstrate(env, seed, noise):
    """Returns: an episode as poco.py's replay buffer takes it."""
    obs, info = env.reset(seed=seed)
    rng, oracle, cube, steps, ended = np.random.default_rng(seed), CubeMarkovOracle(env=env), None, [], False
    np.random.seed(seed)  # the oracle's
    while not ended:
        cubes, goals = cubes_and_goals(env)
        far = np.linalg.norm(cubes - goals, axis=1) > 0.03
        carried = cube is not None and info["proprio/effector_pos"][2] < 0.16
        if far.any() and not (carried or (cube is not None and far[cube])):
            cube = int(far.argmax())
            oracle.reset(obs, info)
        block = {"target_block": cube or 0, "target_block_pos": goals[cube or 0], "target_block_yaw": [0.0]}
        action = oracle.select_action(obs, info | {f"privileged/{name}": v for name, v in block.items()})
        action = np.clip(action + noise * rng.standard_normal(len(action)), -1, 1)
        next_obs, reward, terminated, truncated, info = env.step(action)
        steps.append((obs, action, reward))
        obs, ended = next_obs, terminated or truncated
    observations, actions, rewards = map(np.array, zip(*steps, strict=True))
    observations = np.vstack([observations, obs])
    return poco.Trajectory(observations, actions, rewards, bool(terminated), float(info["success"]), seed)


if __name__ == "__main__":
    args = tyro.cli(Args)
    env = gym.make(args.env_id)
    seeds = trange((2 * args.seed + 1) * 10**6, (2 * args.seed + 1) * 10**6 + args.num_demos)
    episodes = [demonstrate(env, seed, args.demo_noise) for seed in seeds]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez(args.out, **poco.to_columns(episodes))
    print(f"success {np.mean([e.success for e in episodes]):.2f},", end=" ")
    print(f"{np.mean([len(e.rewards) for e in episodes]):.0f} steps an episode")
