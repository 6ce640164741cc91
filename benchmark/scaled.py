"""FetchPickAndPlace-v4 with rewards times 0.01 or 100, and demonstrations with such rewards.

    python benchmark/scaled.py    writes the demonstrations, runs/fetch-x0.01.npz and -x100.npz
    python poco.py --env-id benchmark.scaled:FetchPickAndPlace-x100-v4 --dataset runs/fetch-x100.npz
"""

from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
FACTORS = (0.01, 100)


def make(factor, **options):
    env = gym.make("FetchPickAndPlace-v4", **options)
    return gym.wrappers.TransformReward(env, lambda reward: factor * reward)


def write_demonstrations(factor):
    with np.load(ROOT / "demos/FetchPickAndPlace-v4.npz") as demos:
        columns = dict(demos)
    columns["rewards"] = factor * columns["rewards"]
    (ROOT / "runs").mkdir(exist_ok=True)
    np.savez_compressed(ROOT / f"runs/fetch-x{factor}.npz", **columns)


for factor in FACTORS:
    make_scaled = partial(make, factor)
    gym.register(f"FetchPickAndPlace-x{factor}-v4", make_scaled, max_episode_steps=50)

if __name__ == "__main__":
    for factor in FACTORS:
        write_demonstrations(factor)
