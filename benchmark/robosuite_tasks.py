"""robosuite's Lift, Can and Square for --env-id.

    pip install robosuite==1.5.2 "mujoco==3.3.7" h5py    after requirements.txt; also NumPy 1.26
    python poco.py --env-id benchmark.robosuite_tasks:Lift-v0 --dataset none

The observation has the keys below in that order, as Robomimic's low-dimensional data sets. The
reward is -1 until the task is solved, which ends the episode.
"""

import gymnasium as gym
import numpy as np
import robosuite

KEYS = ("object-state", "robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
TASKS = {"Lift": ("Lift", 200), "Can": ("PickPlaceCan", 400), "Square": ("NutAssemblySquare", 400)}


class Robosuite(gym.Env):
    def __init__(self, task):
        self.env = robosuite.make(
            task,
            robots="Panda",
            has_renderer=False,
            has_offscreen_renderer=False,
            use_camera_obs=False,
            ignore_done=True,  # else its horizon would be reported as the end
        )
        low, high = self.env.action_spec
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high))
        size = len(self.flat(self.env.reset()))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float64)

    def flat(self, obs):
        return np.concatenate([np.ravel(obs[key]) for key in KEYS])

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.env.rng.bit_generator.state = self.np_random.bit_generator.state
        return self.flat(self.env.reset()), {}

    def step(self, action):
        obs, _, _, _ = self.env.step(action)
        success = bool(self.env._check_success())
        return self.flat(obs), success - 1.0, success, False, {"success": success}

    def close(self):
        self.env.close()


for name, (task, steps) in TASKS.items():
    gym.register(f"{name}-v0", Robosuite, max_episode_steps=steps, kwargs={"task": task})
