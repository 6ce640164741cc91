"""Meta-World's 50 tasks, and three of them in one, for --env-id, and demonstrations of them.

    pip install scipy && pip install --no-deps metaworld==3.1.1    does not touch mujoco
    python benchmark/metaworld_tasks.py --task peg-insert-side --out runs/peg-insert-side.npz
    python poco.py --env-id benchmark.metaworld_tasks:peg-insert-side-v0 \\
        --dataset runs/peg-insert-side.npz

Goal and object are drawn by the seed of each reset, and are in the observation. The reward is -1
until the task is solved, which ends the episode, as do 200 steps. The task three-tasks has the
index of the task, one-hot, in the observation; to evaluate on one of them, three-tasks-assembly-v0
and so on draw that one alone. button-press-dense-v0 and so on have the package's
own reward, from 0 to 10, as reward / 10 - 1. Meta-World's own ids ignore the seed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro
from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
from metaworld.policies import ENV_POLICY_MAP
from tqdm import trange

THREE = ("peg-insert-side", "assembly", "hammer")
SUFFIX = "-v3-goal-observable"
NAMES = [name.removesuffix(SUFFIX) for name in ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE]


@dataclass
class Args:
    task: str  # without -v0
    out: Path
    num_demos: int = 25
    demo_noise: float = 0.3  # standard deviation added to the actions of the scripted policy
    seed: int = 1


class Tasks(gym.Env):
    """One task or several, of which each reset draws one, or takes the one called only."""
    def __init__(self, names, only=None, dense=False, render_mode=None):
        self.names = names
        self.only = only
        self.dense = dense
        self.envs = []
        for name in names:
            make = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[name + SUFFIX]
            env = make(render_mode=render_mode)
            env._freeze_rand_vec = False  # a new goal at each reset
            env.seeded_rand_vec = True  # drawn by its seed
            self.envs.append(env)
        self.render_mode = render_mode
        self.metadata = self.envs[0].metadata
        self.action_space = self.envs[0].action_space
        size = len(self.envs[0].reset()[0]) + (len(names) if len(names) > 1 else 0)
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float64)

    def flat(self, obs):
        if len(self.names) == 1:
            return obs
        one_hot = np.arange(len(self.names)) == self.index
        return np.concatenate([obs, one_hot])

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.index = int(self.np_random.integers(len(self.names)))
        if self.only:
            self.index = self.names.index(self.only)
        self.env = self.envs[self.index]
        self.env.seed(int(self.np_random.integers(2**31)))  # its reset ignores one
        self.obs, info = self.env.reset()
        return self.flat(self.obs), info

    def step(self, action):
        self.obs, reward, _, truncated, info = self.env.step(action)
        success = info["success"] > 0
        reward = reward / 10 - 1 if self.dense else success - 1.0
        return self.flat(self.obs), reward, success, truncated, {"success": success}

    def render(self):
        return self.env.render()

    def close(self):
        for env in self.envs:
            env.close()


for task in NAMES:
    names = {"names": (task,)}
    gym.register(f"{task}-v0", Tasks, max_episode_steps=200, kwargs=names)
    gym.register(f"{task}-dense-v0", Tasks, max_episode_steps=200, kwargs=names | {"dense": True})
gym.register("three-tasks-v0", Tasks, max_episode_steps=200, kwargs={"names": THREE})
for task in THREE:
    only = {"names": THREE, "only": task}
    gym.register(f"three-tasks-{task}-v0", Tasks, max_episode_steps=200, kwargs=only)


def demonstrate(env, policies, seed, noise):
    """Returns: an episode's rows of poco.py's --dataset."""
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    task = env.unwrapped
    policy = policies[task.names[task.index]]
    rows = []
    ended = False
    while not ended:
        action = policy.get_action(task.obs) + noise * rng.standard_normal(4)
        action = np.clip(action, -1, 1)
        next_obs, reward, terminated, truncated, info = env.step(action)
        rows.append((obs, action, reward, terminated, truncated, next_obs, info["success"]))
        obs = next_obs
        ended = terminated or truncated
    return rows


def main(args):
    env = gym.make(f"{args.task}-v0")
    policies = {name: ENV_POLICY_MAP[f"{name}-v3"]() for name in env.unwrapped.names}
    first_seed = (2 * args.seed + 1) * 10**6
    rows = []
    for seed in trange(first_seed, first_seed + args.num_demos, file=sys.stderr):
        rows += demonstrate(env, policies, seed, args.demo_noise)
    names = ["observations", "actions", "rewards", "terminals", "timeouts"]
    names += ["next_observations", "success"]
    columns = {}
    for name, column in zip(names, zip(*rows, strict=True), strict=True):
        columns[name] = np.array(column, np.float32)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **columns)
    ends = columns["terminals"] + columns["timeouts"] > 0
    success = columns["success"][ends].mean()
    print(f"{ends.sum()} episodes, success {success:.2f}, {len(rows) / ends.sum():.0f} steps each")


if __name__ == "__main__":
    main(tyro.cli(Args))
