"""Play data of OGBench's scene and puzzles by that package's plan oracles, in its own file layout.

    pip install ogbench "mujoco==3.11.0"
    python benchmark/ogbench_play.py --name scene-play-v0
    python poco.py --env-id ogbench:scene-singletask-task1-v0 \\
        --dataset ogbench:scene-play-singletask-task1-v0

The file lies where ogbench looks before it downloads the official one, which has 1 000 000 steps.
In play, random things are done one after the other, whatever the task is.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import ogbench
import tyro
from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle
from tqdm import trange

EPISODE = 1001  # rows, as in the official data: the last is only seen


@dataclass
class Args:
    name: str = "scene-play-v0"  # of the official data set
    num_steps: int = 100_000  # as many in all; a tenth more for the -val file
    noise: float = 0.1  # of the oracles' plans, as in the official data
    seed: int = 1
    folder: Path = Path(ogbench.utils.DEFAULT_DATASET_DIR)


def make_oracles(env, noise):
    closed = "puzzle" in env.spec.id  # the gripper has nothing to grasp there
    return {
        "cube": CubePlanOracle(env=env, noise=noise),
        "button": ButtonPlanOracle(env=env, noise=noise, gripper_always_closed=closed),
        "drawer": DrawerPlanOracle(env=env, noise=noise),
        "window": WindowPlanOracle(env=env, noise=noise),
    }


def play(env, oracles, seed):
    """Returns: rows of observation, action, terminal, qpos, qvel, button states."""
    np.random.seed(seed)  # the oracles'
    obs, info = env.reset(seed=seed)
    rows = []
    oracle = None
    for i in range(EPISODE):
        if oracle is None or oracle.done:
            if oracle:
                obs, info = env.unwrapped.set_new_target()
            oracle = oracles[info["privileged/target_task"]]
            oracle.reset(obs, info)
        action = oracle.select_action(obs, info).clip(-1, 1)
        next_obs, _, _, _, info = env.step(action)
        state = [info[f"prev_{name}"] for name in ("qpos", "qvel", "button_states")]
        rows.append((obs, action, i == EPISODE - 1, *state))
        obs = next_obs
    return rows


def main(args):
    env_name = args.name.replace("-play", "")
    env = gym.make(
        env_name, terminate_at_goal=False, mode="data_collection", max_episode_steps=EPISODE
    )
    oracles = make_oracles(env, args.noise)
    folder = args.folder.expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    names = ["observations", "actions", "terminals", "qpos", "qvel", "button_states"]
    seed = args.seed * 10**6
    for suffix, share in (("", 1), ("-val", 0.1)):
        path = folder / f"{args.name}{suffix}.npz"
        if path.exists():
            raise SystemExit(f"ogbench_play.py: {path} is there already.")
        rows = []
        for _ in trange(math.ceil(share * args.num_steps / (EPISODE - 1))):
            rows += play(env, oracles, seed)
            seed += 1
        arrays = [np.array(column, np.float32) for column in zip(*rows, strict=True)]
        np.savez_compressed(path, **dict(zip(names, arrays, strict=True)))
        print(path)


if __name__ == "__main__":
    main(tyro.cli(Args))
