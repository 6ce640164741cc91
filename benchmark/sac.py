"""Stable-Baselines3's SAC with hindsight (HER) and demonstrations, evaluated as poco.py is.

    pip install -r benchmark/requirements.txt
    python benchmark/sac.py --policy runs/.../clone.pt    that clone's arguments, task and data

For environments with a goal. SAC's actor cannot start from a flow: it starts with
--critic-warmup gradient steps on the demonstrations, then makes one a step. Its settings are those
published for HER (Stable-Baselines3's example; tau from its zoo, for Fetch). --resume begins anew
in the same folder.
"""

import csv
import sys
import time
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import poco

PUBLISHED = {"learning_rate": 1e-3, "batch_size": 256, "gamma": 0.95, "tau": 0.05}
LAYERS = [256, 256, 256]
HER = {"n_sampled_goal": 4, "goal_selection_strategy": "future"}


class Actor(torch.nn.Module):
    """The mode of SAC's actor as a policy of poco.py: flat observations, chunks of one action."""
    def __init__(self, model):
        super().__init__()
        self.actor = model.actor
        self.spaces = model.observation_space.spaces  # in the order of gym.spaces.flatten
        self.widths = [gym.spaces.flatdim(space) for space in self.spaces.values()]

    def encode(self, obs):
        return obs.float()

    def sample(self, features):
        parts = features.split(self.widths, dim=1)
        obs = dict(zip(self.spaces, parts, strict=True))
        return self.actor(obs, deterministic=True)


class NoCritic:
    """poco.evaluate wants critics; SAC acts without."""
    def encode(self, obs):
        return obs

    def __call__(self, features, chunk):
        return torch.zeros(1, len(chunk))


class Evaluate(BaseCallback):
    """Learns from the demonstrations, then evaluates and writes what benchmark/run.py reads."""
    def __init__(self, args, folder):
        super().__init__()
        self.args = args
        self.folder = folder
        self.start_time = time.time()
        self.rows = []

    def _on_training_start(self):
        self.model.train(self.args.critic_warmup, PUBLISHED["batch_size"])
        self.evaluate()

    def _on_step(self):
        step = self.num_timesteps
        if step % self.args.eval_interval == 0 or step == self.args.total_timesteps:
            self.evaluate()
        return True

    def evaluate(self):
        """Adds a row to metrics.csv and writes policy.pt."""
        step = self.num_timesteps
        policy = Actor(self.model)
        drawn = np.random.get_state()
        with torch.random.fork_rng():  # poco.evaluate seeds, and its environments seed NumPy
            values = poco.evaluate(policy, NoCritic(), self.args, self.folder, f"step {step}")
        np.random.set_state(drawn)
        row = {"global_step": step, "seconds": time.time() - self.start_time}
        self.rows.append(row | values)
        with open(self.folder / "metrics.csv", "w") as file:
            writer = csv.DictWriter(file, self.rows[0])
            writer.writeheader()
            writer.writerows(self.rows)
        networks = {"policy": self.model.policy.state_dict()}
        poco.save_file(self.folder / "policy.pt", self.args, networks)


def add_episode(buffer, space, episode):
    """Writes an episode with flat observations into the buffer of one environment."""
    all_obs = []
    for flat in episode.obs:
        parts = gym.spaces.unflatten(space, flat)
        all_obs.append({name: part[None] for name, part in parts.items()})
    last = len(episode.actions) - 1
    for t, action in enumerate(episode.actions):
        done = t == last
        info = {"TimeLimit.truncated": done and not episode.terminated}
        reward = episode.rewards[t]
        buffer.add(all_obs[t], all_obs[t + 1], action[None], [reward], [done], [info])


def train(args, _):
    """In the place of poco.train."""
    args = replace(args, chunk_size=1, best_of_n=1, **PUBLISHED)
    env = gym.make(args.env_id)
    poco.require(hasattr(env.unwrapped, "compute_reward"), "SAC with HER needs goals.")
    flat_env = poco.Environment(args, first_seed=0)
    flat_env.close()
    demos = poco.load_demonstrations(args, flat_env)
    poco.require(demos, "SAC needs demonstrations here.")
    demo_steps = sum(len(episode.actions) for episode in demos)
    model = SAC(
        "MultiInputPolicy",
        env,
        replay_buffer_class=HerReplayBuffer,
        replay_buffer_kwargs=HER,
        buffer_size=demo_steps + args.total_timesteps,
        policy_kwargs={"net_arch": LAYERS},
        learning_starts=0,
        seed=args.seed + 10**9,  # of no other episode
        **PUBLISHED,
    )
    for episode in demos:
        add_episode(model.replay_buffer, env.observation_space, episode)
    name = f"{args.env_id}__sac__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = args.resume or Path("runs") / name.replace("/", "-").replace(":", "-")
    folder.mkdir(parents=True, exist_ok=True)
    poco.save_file(folder / "checkpoint.pt", args, {})
    model.learn(args.total_timesteps, Evaluate(args, folder))


if __name__ == "__main__":
    poco.METHOD = "benchmark/sac"
    poco.train = train
    poco.main()
