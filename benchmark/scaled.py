"""FetchPickAndPlace-v4, rewards times 0.01 or 100: --env-id benchmark.scaled:FetchPickAndPlace-x100-v4"""

from functools import partial

import gymnasium as gym


def make(factor, **others):
    return gym.wrappers.TransformReward(gym.make("FetchPickAndPlace-v4", **others), lambda r: factor * r)


for factor in (0.01, 100):
    gym.register(f"FetchPickAndPlace-x{factor}-v4", partial(make, factor), max_episode_steps=50)
