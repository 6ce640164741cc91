"""Stable-Baselines3's SAC with hindsight (HER) and the demonstrations in its buffer, evaluated as poco.py is.

    pip install -r benchmark/requirements.txt
    python benchmark/sac.py --policy runs/.../clone.pt    that clone's arguments, task and demonstrations

For environments with a goal. SAC's actor cannot start from a flow: it starts with --critic-warmup gradient
steps on the demonstrations, then makes one a step, in one environment. Its settings are those published for
HER (Stable-Baselines3's example; tau from its zoo, for Fetch). --resume begins anew in the same folder.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import torch
import tyro
from stable_baselines3 import SAC, HerReplayBuffer
from stable_baselines3.common.callbacks import BaseCallback

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import poco

PUBLISHED = {"learning_rate": 1e-3, "batch_size": 256, "gamma": 0.95, "tau": 0.05}
HER = {"n_sampled_goal": 4, "goal_selection_strategy": "future"}


class Actor:
    """The mode of SAC's actor as a policy of poco.evaluate: flat observations, chunks of one action."""
    def __init__(self, model):
        self.model, self.normalize = model, SimpleNamespace(mean=torch.zeros((), device=model.device))

    def sample(self, obs):
        spaces = self.model.observation_space.spaces  # in the order of gym.spaces.flatten
        parts = obs.split([gym.spaces.flatdim(space) for space in spaces.values()], dim=1)
        return self.model.actor(dict(zip(spaces, parts, strict=True)), deterministic=True)


class Evaluate(BaseCallback):
    """Learns from the demonstrations, then evaluates and writes what benchmark/run.py reads."""
    def __init__(self, args, folder):
        super().__init__()
        self.args, self.folder, self.start_time, self.rows = args, folder, time.time(), []

    def _on_training_start(self):
        self.model.train(self.args.critic_warmup, PUBLISHED["batch_size"])
        self._on_step()

    def _on_step(self):
        step, args = self.num_timesteps, self.args
        if step % args.eval_interval == 0 or step == args.total_timesteps:
            with torch.random.fork_rng():  # poco.evaluate seeds
                policy, critic = Actor(self.model), lambda obs, chunk: obs.T[:1]  # nothing to choose
                values = poco.evaluate(policy, critic, args, 1, Path(f"step {step}"))
            self.rows.append({"global_step": step, "seconds": time.time() - self.start_time} | values)
            lines = [self.rows[0], *(row.values() for row in self.rows)]
            text = "".join(",".join(map(str, line)) + "\n" for line in lines)
            poco.save_file(self, "policy.pt", {"policy": self.model.policy.state_dict()})
            poco.write_file(self.folder / "metrics.csv", text.encode())
        return True


def add_episode(buffer, space, episode):
    """Writes an episode with flat observations into the buffer of one environment."""
    obs = [{key: part[None] for key, part in gym.spaces.unflatten(space, o).items()} for o in episode.obs]
    for t, (action, reward) in enumerate(zip(episode.actions, episode.rewards, strict=True)):
        done = t == len(episode.actions) - 1
        infos = [{"TimeLimit.truncated": done and not episode.terminated}]
        buffer.add(obs[t], obs[t + 1], action[None], [reward], [done], infos)


def train(args):
    env, name = gym.make(args.env_id), f"{args.env_id}__sac__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
    folder = args.resume or Path("runs") / name.replace("/", "-").replace(":", "-")
    callback, demos = Evaluate(args, folder), poco.load_demonstrations(args)
    poco.require(demos and hasattr(env.unwrapped, "compute_reward"), "sac.py needs demonstrations and goals.")
    size = sum(len(episode.actions) for episode in demos) + args.total_timesteps
    buffer = {"replay_buffer_class": HerReplayBuffer, "replay_buffer_kwargs": HER, "buffer_size": size}
    others = {"policy_kwargs": {"net_arch": [256, 256, 256]}, "learning_starts": 0, "seed": args.seed + 10**9}
    model = SAC("MultiInputPolicy", env, **PUBLISHED, **buffer, **others)  # a seed of no other episode
    for episode in demos:
        add_episode(model.replay_buffer, env.observation_space, episode)
    folder.mkdir(parents=True, exist_ok=True)
    poco.save_file(callback, "checkpoint.pt", {})
    model.learn(args.total_timesteps, callback)


if __name__ == "__main__":
    try:
        arguments = tyro.cli(poco.Args)
        file = arguments.resume / "checkpoint.pt" if arguments.resume else arguments.policy
        arguments = tyro.cli(poco.Args, default=poco.read_file(file)[0]) if file else arguments
        poco.check(arguments)
        torch.set_num_threads(arguments.torch_threads or torch.get_num_threads())
        train(replace(arguments, chunk_size=1, best_of_n=1, **PUBLISHED))
    except (poco.UserError, OSError) as error:
        print(f"sac.py: {error}", file=sys.stderr)
        sys.exit(2)
