"""Robomimic's five robosuite tasks for --env-id: Lift, Can, Square, Transport and ToolHang.

    pip install robosuite==1.5.2 "mujoco==3.3.7" h5py    after requirements.txt; also NumPy 1.26
    python poco.py --env-id benchmark.robosuite_tasks:Lift-v0 --dataset none

Controller, observation and episode length are those of Robomimic's low-dimensional data sets; the
observation's parts have Robomimic's order and names. The reward is -1 until the task is solved,
which ends the episode. robomimic_data.py reads such data sets, robosuite_demos.py writes them.
"""

import gymnasium as gym
import numpy as np
import robosuite

TASKS = {  # robosuite's name, robots, steps
    "Lift": ("Lift", 1, 400),
    "Can": ("PickPlaceCan", 1, 400),
    "Square": ("NutAssemblySquare", 1, 400),
    "Transport": ("TwoArmTransport", 2, 700),
    "ToolHang": ("ToolHang", 1, 700),
}
ARM = {  # Robomimic's controller: an action of 1 moves its target by 5 cm or turns it by 0.5
    "type": "OSC_POSE",
    "input_max": 1,
    "input_min": -1,
    "output_max": [0.05, 0.05, 0.05, 0.5, 0.5, 0.5],
    "output_min": [-0.05, -0.05, -0.05, -0.5, -0.5, -0.5],
    "kp": 150,
    "damping_ratio": 1,
    "impedance_mode": "fixed",
    "uncouple_pos_ori": True,
    "input_type": "delta",
    "input_ref_frame": "world",
    "interpolation": None,
    "gripper": {"type": "GRIP"},
}


class Robosuite(gym.Env):
    metadata = gym.Env.metadata | {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, task, render_mode=None):
        self.name, robots, _ = TASKS[task]
        self.options = {
            "robots": ["Panda"] * robots,
            "controller_configs": {"type": "BASIC", "body_parts": {"right": ARM}},
            "control_freq": 20,
            "reward_shaping": False,
            "ignore_done": True,  # else its horizon would be reported as the end
            "has_renderer": False,
            "has_offscreen_renderer": render_mode == "rgb_array",
            "use_camera_obs": False,
        }
        self.env = robosuite.make(self.name, **self.options)
        self.render_mode = render_mode
        self.keys = ["object"]
        for i in range(robots):
            self.keys += [f"robot{i}_eef_pos", f"robot{i}_eef_quat", f"robot{i}_gripper_qpos"]
        low, high = self.env.action_spec
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high))
        size = len(self.flat(self.env._get_observations()))
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (size,), np.float64)

    def flat(self, obs):
        """Returns: the observation as a vector. Its parts are in self.obs."""
        obs["object"] = obs["object-state"]
        self.obs = {key: obs[key] for key in self.keys}
        return np.concatenate(list(self.obs.values()))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.rng.bit_generator.state = self.np_random.bit_generator.state
        self.env.reset()
        obs = self.env._get_observations(force_update=True)  # in its first one some poses are 0
        return self.flat(obs), {}

    def reset_to(self, model, *states):
        """Goes through recorded states of the simulator, in the scene they were recorded in."""
        self.env.reset_from_xml_string(self.env.edit_model_xml(model))
        self.env.sim.reset()
        for state in states:
            self.env.sim.set_state_from_flattened(state)
            self.env.sim.forward()
            self.flat(self.env._get_observations(force_update=True))

    def step(self, action):
        obs, _, _, _ = self.env.step(action)
        success = bool(self.env._check_success())
        return self.flat(obs), success - 1.0, success, False, {"success": success}

    def render(self):
        return self.env.sim.render(512, 512, camera_name="agentview")[::-1]

    def close(self):
        self.env.close()


for task, (_, _, steps) in TASKS.items():
    gym.register(f"{task}-v0", Robosuite, max_episode_steps=steps, kwargs={"task": task})
