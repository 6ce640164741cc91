"""Draws two policies of poco.py side by side on the same episodes.

pip install pillow
MUJOCO_GL=egl python benchmark/gif.py clone/policy.pt tuned/policy.pt --seeds 5 7
"""

import sys
from dataclasses import dataclass, field
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
    out: Path = Path("assets/before_after.gif")
    width: int = 240  # of each picture, in pixels


def frames(path: Path, seed: int, width: int) -> tuple[list[Image.Image], bool]:
    """One episode, a picture every second step, the result in the last ones; and whether it succeeded."""
    args, policy, critic = poco.load_policy(path)
    env, pictures, episode = poco.Environment(args, "rgb_array"), [], None
    torch.manual_seed(seed)
    env.reset(seed)
    while episode is None:
        if not env.chunk:
            env.chunk = list(poco.choose_chunks(policy, critic, 1, env.obs[None]).reshape(-1, env.action_dim))
        episode = env.step()
        picture = Image.fromarray(env.env.render()).crop((150, 120, 390, 360))  # around the gripper
        pictures.append(picture.resize((width, width)))
    env.env.close()
    for picture in pictures[-12:]:
        ImageDraw.Draw(picture).text((8, 8), "success" if episode.success else "failure", fill="white")
    return pictures[::2] + [pictures[-1]] * 8, bool(episode.success)


def main(args: Args) -> None:
    film = []
    for seed in args.seeds:
        (left, first), (right, second) = (frames(path, seed, args.width) for path in args.policies)
        print(f"seed {seed}: {first}, {second}")
        for pair in zip(left, right, strict=True):
            film.append(Image.fromarray(np.hstack([np.asarray(picture) for picture in pair])).quantize(64))
    film[0].save(args.out, save_all=True, append_images=film[1:], duration=80, loop=0, optimize=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
