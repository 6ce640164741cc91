"""FetchReach by two cameras for --env-id, and demonstrations of it.

    MUJOCO_GL=egl python benchmark/camera_tasks.py --out runs/reach-camera.npz
    MUJOCO_GL=egl python poco.py --env-id benchmark.camera_tasks:FetchReachCamera-v0 \\
        --dataset runs/reach-camera.npz

The goal is in the images alone; the robot's own position and velocity are a vector.
"""

from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import gymnasium_robotics
import mujoco
import numpy as np
import tyro
from tqdm import trange

gym.register_envs(gymnasium_robotics)
VIEWS = {"front": 180, "side": 90}  # degrees around the table


@dataclass
class Args:
    out: Path
    num_demos: int = 20
    demo_noise: float = 0.4  # standard deviation of the noise on their actions
    seed: int = 1


class Cameras(gym.ObservationWrapper):
    """Images of both views beside the robot's own state."""
    def __init__(self, env):
        super().__init__(env)
        model = env.unwrapped.model
        model.vis.quality.shadowsize = 0  # shadows and smooth edges are slow without a GPU
        model.vis.quality.offsamples = 0
        self.renderer = mujoco.Renderer(model, 64, 64)
        self.cameras = {}
        for name, azimuth in VIEWS.items():
            camera = mujoco.MjvCamera()
            camera.lookat[:] = (1.34, 0.75, 0.53)  # where the gripper starts
            camera.distance = 0.9
            camera.azimuth = azimuth
            camera.elevation = -20
            self.cameras[name] = camera
        parts = {"state": env.observation_space["observation"]}
        for name in VIEWS:
            parts[name] = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(parts)

    def observation(self, obs):
        robot = self.env.unwrapped
        robot._render_callback()  # moves the mark to the goal
        parts = {"state": obs["observation"]}
        for name, camera in self.cameras.items():
            self.renderer.update_scene(robot.data, camera)
            parts[name] = self.renderer.render()
        return parts

    def close(self):
        self.renderer.close()
        super().close()


def make():
    return Cameras(gym.make("FetchReach-v4"))


gym.register("FetchReachCamera-v0", make, max_episode_steps=50)


def demonstrate(env, seed, noise):
    """Returns: rows of poco.py's --dataset; the last only shows where the episode ended."""
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    rows = []
    truncated = False
    success = 0.0
    while not truncated:
        full = env.unwrapped._get_obs()
        delta = full["desired_goal"] - full["achieved_goal"]
        action = np.append(15 * delta, 0).clip(-1, 1)
        action = np.clip(action + noise * rng.standard_normal(4), -1, 1)
        next_obs, reward, _, truncated, info = env.step(action)
        success = info["is_success"]
        parts = [obs[name] for name in env.observation_space]
        rows.append((*parts, action, reward, 0, 0, success))
        obs = next_obs
    parts = [obs[name] for name in env.observation_space]
    rows.append((*parts, np.zeros(4), 0, 0, 1, success))
    return rows


def main(args):
    env = gym.make("FetchReachCamera-v0")
    names = [f"observations/{name}" for name in env.observation_space]
    names += ["actions", "rewards", "terminals", "timeouts", "success"]
    first_seed = (2 * args.seed + 1) * 10**6
    rows = []
    for seed in trange(first_seed, first_seed + args.num_demos):
        rows += demonstrate(env, seed, args.demo_noise)
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **dict(zip(names, columns, strict=True)))
    ends = columns[-2] > 0
    print(f"{ends.sum()} episodes, success {columns[-1][ends].mean():.2f}")


if __name__ == "__main__":
    main(tyro.cli(Args))
