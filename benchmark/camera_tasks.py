"""FetchReach by two cameras for --env-id, the same from vectors, and demonstrations of both.

    MUJOCO_GL=egl python benchmark/camera_tasks.py --out runs/reach-camera.npz
    MUJOCO_GL=egl python poco.py --env-id benchmark.camera_tasks:FetchReachCamera-v0 \\
        --dataset runs/reach-camera.npz

The goal is in the images alone, as a red mark; the gripper's position and velocity are a vector.
Steps are a quarter of FetchReach's, the reward is minus the distance in metres, and coming within
2 cm of the goal, not 5, ends the episode. FetchReachVectors-v0 has the goal as a vector, for data
made with --task FetchReachVectors.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    task: Literal["FetchReachCamera", "FetchReachVectors"] = "FetchReachCamera"
    num_demos: int = 60
    demo_noise: float = 0.4  # standard deviation of the noise on their actions
    seed: int = 1


class Reach(gym.Wrapper):
    """FetchReachDense in quarter steps, to a tolerance of 2 cm, ended by success."""
    def __init__(self, env):
        super().__init__(env)
        env.unwrapped.distance_threshold = 0.02  # metres

    def step(self, action):
        obs, reward, _, truncated, info = self.env.step(action / 4)
        return obs, reward, info["is_success"] > 0, truncated, info


class Cameras(gym.ObservationWrapper):
    """Images of both views beside the robot's own state."""
    def __init__(self, env):
        super().__init__(env)
        model = env.unwrapped.model
        model.vis.quality.shadowsize = 0  # shadows and smooth edges are slow without a GPU
        model.vis.quality.offsamples = 0
        model.site("target0").size[:] = 0.04  # metres, its radius: seven pixels wide
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
        robot = self.unwrapped
        robot._render_callback()  # moves the mark to the goal
        parts = {}
        for name, camera in self.cameras.items():
            self.renderer.update_scene(robot.data, camera)
            parts[name] = self.renderer.render()
        parts["state"] = obs["observation"]
        return parts

    def close(self):
        self.renderer.close()
        super().close()


def make_vectors():
    return gym.wrappers.FlattenObservation(Reach(gym.make("FetchReachDense-v4")))


def make_camera():
    return Cameras(Reach(gym.make("FetchReachDense-v4")))


gym.register("FetchReachVectors-v0", make_vectors, max_episode_steps=50)
gym.register("FetchReachCamera-v0", make_camera, max_episode_steps=50)


def columns(obs):
    """Returns: what --dataset has of an observation, by the end of its key."""
    if isinstance(obs, dict):
        return {f"/{name}": part for name, part in obs.items()}
    return {"": obs}


def demonstrate(env, seed, noise):
    """Returns: an episode's rows of poco.py's --dataset."""
    rng = np.random.default_rng(seed)
    obs, _ = env.reset(seed=seed)
    rows = []
    ended = False
    while not ended:
        full = env.unwrapped._get_obs()
        delta = full["desired_goal"] - full["achieved_goal"]
        action = np.append(15 * delta, 0).clip(-1, 1)
        action = np.clip(action + noise * rng.standard_normal(4), -1, 1)
        next_obs, reward, terminated, truncated, info = env.step(action)
        row = {f"observations{end}": part for end, part in columns(obs).items()}
        row |= {f"next_observations{end}": part for end, part in columns(next_obs).items()}
        row |= {"actions": action, "rewards": reward, "success": info["is_success"]}
        row |= {"terminals": terminated, "timeouts": truncated}
        rows.append(row)
        obs = next_obs
        ended = terminated or truncated
    return rows


def main(args):
    env = gym.make(f"{args.task}-v0")
    first_seed = (2 * args.seed + 1) * 10**6
    rows = []
    for seed in trange(first_seed, first_seed + args.num_demos):
        rows += demonstrate(env, seed, args.demo_noise)
    data = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(args.out, **data)
    success = data["success"].sum() / args.num_demos
    print(f"success {success:.2f}, {len(rows) / args.num_demos:.0f} steps an episode")


if __name__ == "__main__":
    main(tyro.cli(Args))
