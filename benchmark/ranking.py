"""Do the critics rank the candidates of one state? MuJoCo's state can be saved and restored.

    python benchmark/ranking.py runs/*/policy.pt

In states of the policy's own episodes, runs every candidate and then the policy to the episode's
end, several times from the same state, and compares the mean returns with Q. For Fetch and other
MuJoCo robots whose environments have a `goal` and do not terminate. After the time limit the last
reward counts for ever.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mujoco
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import poco

WHOLE = mujoco.mjtState.mjSTATE_INTEGRATION
FIRST_SEED = 10**6  # of the episodes


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
    return state, robot.goal.copy(), env.obs[-1]


def restore(env, saved):
    """Begins an episode in a saved state."""
    state, goal, obs = saved
    env.reset(seed=0)
    robot = env.env.unwrapped
    robot.goal = goal.copy()
    mujoco.mj_setState(robot.model, robot.data, state, WHOLE)
    mujoco.mj_forward(robot.model, robot.data)
    env.obs = [obs]


def run(env, choose, steps):
    """Goes on with the episode for so many steps or to its end. Returns: its rewards."""
    ended = []
    while not ended and len(env.steps) < steps:
        if not env.chunk:
            env.set_chunk(choose(env.obs[-1]))
        ended = env.step()
    episode = (ended or env.episode(terminated=False))[0]
    return episode.rewards


def walk(env, seed, choose, steps):
    """Returns: the state after so many steps of an episode."""
    env.reset(seed)
    if steps > 0:
        run(env, choose, steps)
    return save(env)


def return_of(env, saved, chunk, choose, gamma, steps):
    """Runs a chunk (D,) from the saved state, then the policy. Returns: the discounted return."""
    restore(env, saved)
    env.set_chunk(chunk)
    rewards = run(env, choose, steps)
    discounts = gamma ** np.arange(steps)
    return discounts @ rewards + gamma**steps * rewards[-1] / (1 - gamma)


def ranks_agree(a, b):
    """Spearman's correlation in each row, averaged over the rows in which neither is constant."""
    correlations = []
    for x, y in zip(a, b, strict=True):
        if np.ptp(x) > 0 and np.ptp(y) > 0:
            x_ranks = x.argsort().argsort()
            y_ranks = y.argsort().argsort()
            correlations.append(np.corrcoef(x_ranks, y_ranks)[0, 1])
    return np.mean(correlations)


def measure(path, own):
    """Returns: Q (states, candidates), returns (states, repeats, candidates), the reward scale."""
    args, policy, critic = poco.load_policy(path)
    choose = partial(poco.choose_chunk, policy, critic, best_of_n=1)
    env = poco.Environment(args, first_seed=0)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    all_q = []
    all_returns = []
    for i in range(own.states):
        chunks_before = int(rng.integers(env.limit // args.chunk_size * 2 // 3))
        start = args.chunk_size * chunks_before
        saved = walk(env, FIRST_SEED + i, choose, start)
        obs = torch.as_tensor(saved[-1]).expand(own.candidates, -1)
        with torch.no_grad():
            chunks = policy.sample(policy.encode(obs))
            q = critic(critic.encode(obs), chunks).mean(0)
        returns = np.empty((own.repeats, own.candidates))
        for repeat, candidate in np.ndindex(returns.shape):
            chunk = chunks[candidate]
            value = return_of(env, saved, chunk, choose, args.gamma, env.limit - start)
            returns[repeat, candidate] = value
        all_q.append(q.numpy())
        all_returns.append(returns)
    return np.array(all_q), np.array(all_returns), critic.reward_scale.item()


def report(path, q, returns, reward_scale):
    truth = returns.mean(1)  # (states, candidates)
    half = returns[:, ::2].mean(1)
    other_half = returns[:, 1::2].mean(1)
    chosen = q.argmax(1)[:, None]
    gain = np.take_along_axis(truth, chosen, axis=1).mean() - truth.mean()
    over_states = ranks_agree(q.mean(1)[None], truth.mean(1)[None])
    print(f"{path}, {len(q)} states of {q.shape[1]} candidates")
    print(f"  rank correlation in a state: Q and returns {ranks_agree(q, truth):.2f}, ", end="")
    print(f"one half of the returns and the other {ranks_agree(half, other_half):.2f}")
    print(f"  over the states' means: {over_states:.2f}; ", end="")
    print(f"the choice by Q gains {gain:.2f} in return; ", end="")
    print(f"mean Q {q.mean():.1f}, return {reward_scale * truth.mean():.1f}")


if __name__ == "__main__":
    arguments = tyro.cli(Args)
    torch.set_num_threads(arguments.torch_threads)
    for file in arguments.files:
        report(file, *measure(file, arguments))
