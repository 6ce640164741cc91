"""Draws two policies of poco.py side by side on the same episodes.

pip install pillow
MUJOCO_GL=egl python assets/gif.py clone/policy.pt tuned/policy.pt --seeds 3 7 --out assets/before_after.gif
"""

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import poco


@dataclass
class Args:
    policies: tyro.conf.Positional[tuple[Path, Path]]
    seeds: list[int] = field(default_factory=lambda: [0, 1])  # of the episodes
    out: Path = Path("before_after.gif")
    width: int = 240  # of each picture, in pixels


def frames(path: Path, seed: int, width: int) -> list[Image.Image]:
    """One episode, a picture every second step, its result in the corner of the last ones."""
    args, policy, critic = poco.load_policy(path, torch.device("cpu"))
    env = poco.make_env(args.env_id, args.chunk_size, args.success_at, "rgb_array")
    act = partial(poco.choose_chunks, policy, critic, 1, torch.Generator().manual_seed(seed))
    (obs, _), pictures, done, info = env.reset(seed=seed), [], False, {}
    while not done:
        for action in act(obs[None]).reshape(args.chunk_size, -1):
            obs, _, terminated, truncated, info = env.step(action)
            done = terminated or truncated
            pictures.append(Image.fromarray(env.render()).crop((60, 40, 420, 400)).resize((width, width)))
            if done:
                break
    result = "success" if info["success"] else "failure"
    for picture in pictures[-12:]:
        ImageDraw.Draw(picture).text((8, 8), result, fill="white")
    return pictures[::2] + [pictures[-1]] * 8


def main(args: Args) -> None:
    film = []
    for seed in args.seeds:
        for left, right in zip(*(frames(path, seed, args.width) for path in args.policies), strict=True):
            film.append(Image.fromarray(np.hstack([np.asarray(left), np.asarray(right)])).quantize(64))
    film[0].save(args.out, save_all=True, append_images=film[1:], duration=80, loop=0, optimize=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
