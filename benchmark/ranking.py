"""Do the critics rank the candidates of one state? MuJoCo knows: its state can be saved and restored.

    python benchmark/ranking.py runs/*/policy.pt

In states of the policy's own episodes, runs every candidate and then the policy to the episode's end, several
times from the same state, and compares the mean returns with Q. For Fetch and other MuJoCo robots whose
environments have a `goal`. After the time limit the last reward counts for ever.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mujoco
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import poco

WHOLE = mujoco.mjtState.mjSTATE_INTEGRATION


@dataclass
class Args:
    files: tyro.conf.Positional[list[Path]]  # policy files
    states: int = 32  # states, of as many episodes
    candidates: int = 8  # chunks in each
    repeats: int = 8  # runs of each candidate
    torch_threads: int = 1  # CPU threads


def save(env):
    robot = env.env.unwrapped
    state = np.empty(mujoco.mj_stateSize(robot.model, WHOLE))
    mujoco.mj_getState(robot.model, robot.data, state, WHOLE)
    return state, robot.goal.copy(), env.obs.copy()


def restore(env, saved):
    env.reset(0)
    robot = env.env.unwrapped
    state, robot.goal, env.obs = saved[0], saved[1].copy(), saved[2].copy()
    mujoco.mj_setState(robot.model, robot.data, state, WHOLE)
    mujoco.mj_forward(robot.model, robot.data)


def returns_of(envs, saved, chunks, act, gamma, steps):
    """Runs chunks (n, D), each in its environment, then the policy. Returns: discounted returns (n,)."""
    for env, chunk in zip(envs, chunks, strict=True):
        restore(env, saved)
        env.chunk = list(chunk.reshape(-1, env.action_dim))
    returns = np.zeros(len(envs))
    for t in range(steps):
        idle = [env for env in envs if not env.chunk]
        if idle:
            for env, chunk in zip(idle, act(np.stack([env.obs for env in idle])), strict=True):
                env.chunk = list(chunk.reshape(-1, env.action_dim))
        episodes = [env.step() for env in envs]
        rewards = [e.rewards[-1] if e else env.steps[-1][2] for e, env in zip(episodes, envs, strict=True)]
        returns += gamma**t * np.array(rewards)
    return returns + gamma**steps * np.array(rewards) / (1 - gamma)


def ranks_agree(a, b):
    """Spearman's correlation in each row, averaged over the rows in which neither is constant."""
    rows = [(x, y) for x, y in zip(a, b, strict=True) if np.ptp(x) and np.ptp(y)]
    return np.mean([np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1] for x, y in rows])


def measure(path, own):
    args, policy, critic = poco.load_policy(path)
    act, rng = partial(poco.choose_chunks, policy, critic, 1), np.random.default_rng(0)
    torch.manual_seed(0)
    envs = [poco.Environment(args) for _ in range(own.candidates)]
    q, returns = np.empty((own.states, own.candidates)), []
    for i in range(own.states):
        envs[0].reset(10**6 + i)
        start = args.chunk_size * int(rng.integers(envs[0].limit // args.chunk_size * 2 // 3))
        while len(envs[0].steps) < start:
            envs[0].chunk = envs[0].chunk or list(act(envs[0].obs[None])[0].reshape(-1, envs[0].action_dim))
            envs[0].step()
        saved = save(envs[0])
        with torch.no_grad():
            obs = torch.as_tensor(saved[2], dtype=torch.float32).expand(own.candidates, -1)
            chunks = policy.sample(obs)
            q[i] = critic(obs, chunks).mean(0)
        run = partial(returns_of, envs, saved, chunks.numpy(), act, args.gamma, envs[0].limit - start)
        returns.append([run() for _ in range(own.repeats)])
    returns = np.array(returns)  # (states, repeats, candidates)
    truth, chosen = returns.mean(1), q.argmax(1)[:, None]
    halves = returns[:, ::2].mean(1), returns[:, 1::2].mean(1)
    gain = (np.take_along_axis(truth, chosen, axis=1)[:, 0] - truth.mean(1)).mean()
    scaled = critic.normalize.reward_scale.item() * truth.mean()
    print(f"{path}, {own.states} states of {own.candidates} candidates")
    print(f"  rank correlation in a state: Q and returns {ranks_agree(q, truth):.2f},", end=" ")
    print(f"one half of the returns and the other {ranks_agree(*halves):.2f}")
    print(f"  over the states' means: {ranks_agree(q.mean(1)[None], truth.mean(1)[None]):.2f};", end=" ")
    print(f"the choice by Q gains {gain:.2f} in return; mean Q {q.mean():.1f}, return {scaled:.1f}")


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    torch.set_num_threads(arguments.torch_threads)
    for file in arguments.files:
        measure(file, arguments)
