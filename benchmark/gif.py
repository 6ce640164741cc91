"""Draws two policies of poco.py or ogpo.py side by side on the same episodes.

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
    """Returns: a picture every second step of an episode, its result in the last ones; success."""
    args, policy, critic = poco.load_policy(path)
    torch.manual_seed(seed)
    env = poco.Environment(args, first_seed=seed, render_mode="rgb_array")
    pictures = []
    ended = []
    while not ended:
        picture = Image.fromarray(env.env.render())  # before the step: the last one resets
        picture = picture.crop((150, 120, 390, 360))  # around the gripper
        pictures.append(picture.resize((width, width)))
        if not env.chunk:
            chunk = poco.choose_chunk(policy, critic, env.obs[-1], best_of_n=1)
            env.set_chunk(chunk)
        ended = env.step()
    env.close()
    success = ended[0].success == 1
    result = "success" if success else "failure"
    for picture in pictures[-12:]:
        ImageDraw.Draw(picture).text((8, 8), result, fill="white")
    pause = [pictures[-1]] * 8
    return pictures[::2] + pause, success


def main(args: Args) -> None:
    film = []
    for seed in args.seeds:
        left, left_success = frames(args.policies[0], seed, args.width)
        right, right_success = frames(args.policies[1], seed, args.width)
        print(f"seed {seed}: {left_success}, {right_success}")
        for pair in zip(left, right, strict=True):
            both = np.hstack([np.asarray(picture) for picture in pair])
            film.append(Image.fromarray(both).quantize(64))
    options = {"duration": 80, "loop": 0, "optimize": True}
    film[0].save(args.out, save_all=True, append_images=film[1:], **options)


if __name__ == "__main__":
    main(tyro.cli(Args))
