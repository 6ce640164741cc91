"""OGPO (arXiv 2605.03065): off-policy PPO on the whole denoising chain of a flow policy over action chunks, in one file.

    python ogpo.py --env-id FetchPickAndPlace-v4                          clone scripted demonstrations, then improve online
    python ogpo.py --env-id FetchPickAndPlace-v4 --bc-success-cap 0.45    the same from a poor clone
    python ogpo.py --evaluate runs/.../policy.pt --render                 watch the result

Letters in shapes: B batch, O observation, A action, T chunk_size, D = T * A, K flow_steps, G chains, M critics, E environments.
"""

import contextlib
import copy
import csv
import difflib
import importlib.util
import io
import itertools
import json
import math
import os
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial, partialmethod
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import gymnasium_robotics
import numpy as np
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None

METHOD = "ogpo"
gym.register_envs(gymnasium_robotics)


@dataclass
class Args:
    # run
    seed: int = 1  # seed of everything random: networks, demonstrations, noise, episodes
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int | None = None  # CPU threads of torch (default: torch's own choice)
    bf16: bool = True  # matrix products of the updates in bfloat16, where the processor has it in hardware
    compile: bool = False  # torch.compile for the updates
    cudagraphs: bool = False  # replay the updates as CUDA graphs
    tensorboard: bool = False  # write event files for TensorBoard too
    track: bool = False  # log to Weights & Biases too
    wandb_project_name: str = "poco-ogpo"  # project there
    wandb_entity: str | None = None  # team there
    log_interval: int = 500  # environment steps between two rows of metrics.csv
    checkpoint_interval: int = 5_000  # environment steps between two checkpoints; unfinished episodes begin anew there
    resume: Path | None = None  # continue the run in this folder; its arguments are taken from there

    # task and data
    env_id: str | None = None  # Gymnasium id (default: FetchPickAndPlace-v4; with --evaluate: the file's); actions: a bounded Box
    dataset: str = "scripted"  # scripted: of a built-in controller; none: no cloning; file.npz with D4RL's flat keys; or a Minari id
    save_dataset: str | None = None  # write the demonstrations to this .npz file
    num_demos: int = 100  # scripted demonstration episodes
    demo_noise: float = 0.4  # standard deviation of the Gaussian noise on the demonstrator's actions, which lie in [-1, 1]
    success_at: Literal["end", "any"] = "end"  # an episode succeeds by its last step, or by any
    reward_scale: float | None = None  # factor on the rewards inside the critics (default: 1 / the largest |reward| in the first data)

    # networks
    hidden_dim: int = 256  # width of the three hidden layers of policy and critics
    chunk_size: int = 5  # T, actions in one chunk, executed open loop
    flow_steps: int = 5  # K, Euler steps from noise to chunk
    num_critics: int = 5  # M, members of the critic ensemble

    # offline phase
    bc_steps: int = 700  # gradient steps of behaviour cloning
    bc_success_cap: float = 1.0  # below 1: a poor start on purpose, the last of ten evaluations before success passes this
    batch_size: int = 256  # chunks in a batch, offline and online
    learning_rate: float = 1e-3  # step size of Adam, for policy and critics

    # online phase
    total_timesteps: int = 20_000  # online environment steps
    num_envs: int = 4  # environments stepped side by side
    buffer_size: int = 1_000_000  # capacity of the replay buffer in environment steps
    critic_warmup_steps: int = 4_000  # environment steps at the start in which the critics learn and the policy stays the clone
    utd_ratio: float = 0.25  # gradient updates per environment step
    gamma: float = 0.96  # discount per environment step
    tau: float = 0.05  # Polyak rate of the target critics
    q_aggregation: Literal["mean", "min"] = "mean"  # how the critics' values become one
    best_of_n: int = 4  # act with the best of n candidates by the target critics; 1: with a single sample of the ODE policy

    # OGPO
    group_size: int = 8  # G, chains per state
    ppo_batch_size: int = 32  # states of the batch that get a group of chains
    sigma: float = 1.0  # noise of the stochastic sampler; up to the error of K steps, the chunks' distribution does not depend on it
    clip_epsilon: float = 0.005  # the ratio of the normalised chain probabilities is clipped to 1 +- epsilon
    ppo_learning_rate: float = 5e-4  # step size of Adam for the policy online
    policy_tau: float = 0.1  # Polyak rate of the old policy, from which the chains come
    conservative: bool = True  # OGPO+CA: count an advantage only where all critics agree on its sign
    success_coef: float = 0.25  # OGPO+: weight of the flow-matching loss on the online episodes that succeeded; 0 switches it off
    chi2_coef: float = 0.0  # weight of the chi-squared penalty for leaving the slow policy; 0 switches it off
    chi2_sharpness: float = 5.0  # how fast pessimism over the critics sets in as the probability ratio to the slow policy passes 1
    chi2_tau: float = 5e-4  # Polyak rate of the slow policy
    next_samples: int = 1  # chunks per next state in the TD target; more reduce its variance
    next_reduction: Literal["mean", "median"] = "mean"  # how their values become one

    # evaluation
    eval_interval: int = 2_500  # environment steps between two evaluations
    eval_episodes: int = 50  # episodes of an evaluation on the way; that of the clone, the last one and --evaluate have 100
    evaluate: Path | None = None  # evaluate this policy file instead of training
    render: bool = False  # with --evaluate: show the episodes in a window
    capture_video: bool = False  # record the first three episodes of every evaluation as MP4

    def __post_init__(self):
        if self.env_id is None and self.evaluate is None:
            self.env_id = "FetchPickAndPlace-v4"


LOWEST = {  # of the other numbers: 1
    "seed": 0, "demo_noise": 0, "critic_warmup_steps": 0, "utd_ratio": 0, "success_coef": 0, "chi2_coef": 0, "group_size": 2,
}  # fmt: skip
HIGHEST = {  # and above 0
    "gamma": 1, "tau": 1, "bc_success_cap": 1, "reward_scale": math.inf, "policy_tau": 1, "chi2_tau": 1,
    "learning_rate": math.inf, "ppo_learning_rate": math.inf, "sigma": math.inf, "clip_epsilon": math.inf,
    "chi2_sharpness": math.inf,
}  # fmt: skip
OPTIONAL = {"tensorboard": "tensorboard", "track": "wandb", "capture_video": "moviepy", "cudagraphs": "tensordict"}  # packages they need


class UserError(Exception):
    """A mistake at the keyboard, in one sentence: what is wrong and what was expected."""


class RunError(Exception):
    """What ends a run on its way, in one sentence."""


def check_args(args: Args) -> None:
    """Raises: UserError for a value that no run can work with."""
    for name, value in vars(args).items():
        option = f"--{name.replace('_', '-')}"
        if name in HIGHEST and value is not None and not 0 < value <= HIGHEST[name]:
            raise UserError(f"{option} must be above 0" + " and at most 1" * (HIGHEST[name] == 1) + f", not {value}.")
        if type(value) in (int, float) and name not in HIGHEST and not LOWEST.get(name, 1) <= value < math.inf:
            hint = "; to start without data, type --dataset none" * (name == "num_demos")
            raise UserError(f"{option} must be at least {LOWEST.get(name, 1)}, not {value}{hint}.")
    if args.buffer_size < args.batch_size:
        raise UserError(f"--buffer-size {args.buffer_size} is below --batch-size {args.batch_size}.")
    if args.cudagraphs and not torch.cuda.is_available():
        raise UserError("--cudagraphs: torch finds no CUDA device here.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; type --device cpu or --device auto.")
    for name, package in OPTIONAL.items():
        if getattr(args, name) and not importlib.util.find_spec(package):
            raise UserError(f"--{name.replace('_', '-')} needs a package that is not installed: pip install {package}")
    for name, limit in (("seed", 2**31), ("hidden_dim", 2**14)):  # beyond it, NumPy's seeds end, and memory runs out silently
        if getattr(args, name) >= limit:
            raise UserError(f"--{name.replace('_', '-')} must be below {limit}, not {getattr(args, name)}.")
    if args.render and not args.evaluate:
        raise UserError("--render shows the episodes of --evaluate; type --evaluate runs/.../policy.pt --render.")
    if args.render and sys.platform == "linux" and not {"DISPLAY", "WAYLAND_DISPLAY"} & set(os.environ):
        raise UserError("--render needs a display, and neither DISPLAY nor WAYLAND_DISPLAY is set.")


# Environment and demonstrations
class Trajectory(NamedTuple):
    """One episode of n steps: the form in which all data reach the replay buffer."""

    obs: np.ndarray  # (n + 1, O), the last one is where the episode ended
    actions: np.ndarray  # (n, A) in [-1, 1]
    rewards: np.ndarray  # (n,)
    terminated: bool  # False: cut off by the time limit
    success: float  # 1 or 0, NaN if the environment does not report it
    seed: int  # of the reset that began it
    tasks: float = math.nan  # how many were completed, where an episode has several


class OneSuccess(gym.Wrapper):
    """Leaves in info what every family has its own key for: success (1, 0, NaN if not reported) and the number of completed tasks."""

    def __init__(self, env: gym.Env, success_at: str):
        super().__init__(env)
        self.success_at = success_at

    def reset(self, **kwargs):
        self.best = math.nan
        return self.env.reset(**kwargs)[0], {}

    def step(self, action):
        *step, info = self.env.step(action)
        tasks, success = math.nan, info.get("is_success", info.get("success", math.nan))  # Fetch, hands; Adroit, mazes, OGBench
        if "episode_task_completions" in info:  # FrankaKitchen
            tasks = len(info["episode_task_completions"])
            success = tasks == len(self.unwrapped.goal)
        self.best = np.fmax(self.best, float(success))  # NaN only if all are
        return *step, {"success": self.best if self.success_at == "any" else float(success), "tasks": float(tasks)}


def make_env(
    env_id: str, chunk_size: int, success_at: str = "end", render_mode: str | None = None, video_folder: Path | None = None
) -> gym.Env:
    """Makes an environment with flat observations (O,) and flat actions (A,) in [-1, 1], whatever its own Box is; if asked to, one that
    records its first three episodes as MP4 files.

    Raises: UserError if it does not exist, cannot be made, has other actions, or its episodes are shorter than a chunk.
    """
    if ":" not in env_id and env_id not in gym.registry:
        near = difflib.get_close_matches(env_id, gym.registry)
        raise UserError(f"There is no environment {env_id}." + f" Did you mean {' or '.join(near)}?" * bool(near))
    try:
        env = gym.make(env_id, render_mode=render_mode, disable_env_checker=True)  # of module:id it imports the module
    except Exception as error:  # it is foreign code
        raise UserError(f"{env_id} could not be made ({type(error).__name__}: {error}).") from error
    space, limit = env.action_space, env.spec.max_episode_steps
    if not (isinstance(space, gym.spaces.Box) and space.is_bounded() and np.issubdtype(space.dtype, np.floating)):
        raise UserError(f"{env_id} has the action space {space}; needed is a bounded Box of real numbers.")
    if limit is not None and chunk_size > limit:
        raise UserError(f"--chunk-size {chunk_size} is longer than an episode of {env_id}, which has {limit} steps.")
    low, high = space.low.flatten(), space.high.flatten()

    def to_own_range(action):
        return (low + (action + 1) / 2 * (high - low)).reshape(space.shape).astype(space.dtype)

    if video_folder:
        env = gym.wrappers.RecordVideo(env, str(video_folder), episode_trigger=lambda episode: episode < 3, disable_logger=True)
    env = gym.wrappers.FlattenObservation(OneSuccess(env, success_at))
    return gym.wrappers.TransformAction(env, to_own_range, gym.spaces.Box(-1, 1, low.shape))


def check_rendering(args: Args) -> None:
    """Raises: UserError if no picture of the environment can be made here."""
    try:
        env = make_env(args.env_id, args.chunk_size, args.success_at, "rgb_array")
        env.reset(seed=0)
        env.render()
    except Exception as error:  # of OpenGL, in many forms
        raise UserError(
            f"--capture-video: {args.env_id} cannot be rendered here ({type(error).__name__}: {error}). Without a screen, set "
            "MUJOCO_GL=egl (Debian: apt install libegl1) or MUJOCO_GL=osmesa (apt install libosmesa6)."
        ) from error


def rollout(make: Callable, num_envs: int, act: Callable, chunk_size: int, seeds: Iterator[int]) -> Iterator[list[Trajectory]]:
    """Steps num_envs environments for ever, chunks open loop, and yields after each step the episodes that ended in it.

    Args: make() gives an environment; act maps obs (E, O) to chunks (E, D); every reset takes the next seed.
    Raises: RunError if the environment raises, or gives an observation or a reward that is not finite.
    """
    # with autoreset off every step is a real one: no action is ignored, no reset looks like a transition
    envs = gym.vector.SyncVectorEnv([make] * num_envs, autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    episode_seeds = [next(seeds) for _ in range(num_envs)]
    obs, _ = envs.reset(seed=episode_seeds)
    chunks = np.zeros((num_envs, chunk_size, envs.single_action_space.shape[0]), np.float32)
    cursor = np.zeros(num_envs, int)  # next action of the chunk
    steps = [[] for _ in range(num_envs)]  # (obs, action, reward) of the unfinished episode
    while True:
        fresh = cursor == 0
        if fresh.any():
            chunks[fresh] = act(obs[fresh]).reshape(-1, *chunks.shape[1:])
        actions = chunks[np.arange(num_envs), cursor]
        try:
            next_obs, rewards, terminated, truncated, infos = envs.step(actions)
        except Exception as error:  # it is foreign code
            raise RunError(f"the environment raised {type(error).__name__}: {error}") from error
        for name, values in (("observation", next_obs), ("reward", rewards)):
            if not np.isfinite(values).all():
                raise RunError(f"the environment's {name} became NaN or infinite")
        for i in range(num_envs):
            steps[i].append((obs[i], actions[i], rewards[i]))
        done, finished = terminated | truncated, []
        for i in np.flatnonzero(done):
            episode_obs, *rest = map(np.array, zip(*steps[i], strict=True))
            end = bool(terminated[i]), float(infos["success"][i]), episode_seeds[i], float(infos["tasks"][i])
            finished.append(Trajectory(np.vstack([episode_obs, next_obs[i]]), *rest, *end))
            steps[i], episode_seeds[i] = [], next(seeds)
        if finished:
            next_obs, _ = envs.reset(seed=episode_seeds, options={"reset_mask": done})
        obs, cursor = next_obs, np.where(done, 0, (cursor + 1) % chunk_size)
        yield finished


def collect_episodes(args: Args, act: Callable, chunk_size: int, seeds: range, *show) -> list[Trajectory]:
    """Runs one episode for each seed; show, a render mode and a folder for videos, goes to make_env.

    Returns: the episodes in the order of the seeds, so long ones count as often as short ones.
    """
    num_envs = 1 if show else min(args.num_envs, len(seeds))
    make, episodes = partial(make_env, args.env_id, args.chunk_size, args.success_at, *show), {}
    with tqdm(total=len(seeds), unit="episode", leave=False) as bar:
        for finished in rollout(make, num_envs, act, chunk_size, itertools.count(seeds.start)):
            episodes |= {episode.seed: episode for episode in finished if episode.seed in seeds}
            bar.update(len(episodes) - bar.n)
            if len(episodes) == len(seeds):
                return [episodes[seed] for seed in seeds]


def go(delta, gripper=-1.0):
    """Action of a proportional step along delta (metres); gripper 1 opens it, -1 closes it."""
    return np.clip([*(15 * delta), gripper], -1, 1)  # an action of 1 moves about 3.3 cm


def fetch_reach(obs):
    """Moves the gripper to the goal."""
    return go(obs[3:6] - obs[6:9])


def fetch_push(obs):
    """Swings over the object until in line behind it, pushes it along that line to the goal, rises."""
    to_goal, rel = (obs[3:6] - obs[9:12]) * [1, 1, 0], -obs[12:15]  # from the object to the goal, to the gripper
    distance = np.linalg.norm(to_goal)
    if distance < 0.03:
        return go(np.array([0, 0, 0.25 - rel[2]]))  # well out of the object's way
    line = to_goal / distance
    along = rel @ line
    wrong = max(np.linalg.norm((rel - along * line)[:2]) - 0.01, 0) + max(along + 0.04, 0)  # metres beside the line, ahead
    ready = np.clip(1 - wrong / 0.02, 0, 1) * np.clip(1 - rel[2] / 0.03, 0, 1)  # blended, since a switch is hard to clone
    target = ready * (0.8 * to_goal + along * line) - (1 - ready) * 0.06 * line
    return go(target - rel + [0, 0, np.clip(3 * wrong, 0, 0.08)])


def fetch_pick_and_place(obs):
    """Hovers over the object, descends, grasps it, carries it to the goal."""
    to_goal, rel, width = obs[3:6] - obs[9:12], obs[12:15], obs[15] + obs[16]  # rel: from the gripper to the object
    if np.linalg.norm(rel) < 0.04:  # between the fingers: close them, and once they hold it, carry
        return go(to_goal if width < 0.055 else rel, -1)
    hover = np.clip(4 * np.linalg.norm(rel[:2]) - 0.04, 0, 0.08)  # descend only when above it
    return go(rel + [0, 0, hover], 1)


SCRIPTED = {"FetchReach": fetch_reach, "FetchPush": fetch_push, "FetchPickAndPlace": fetch_pick_and_place}


def make_demonstrations(args: Args) -> list[Trajectory]:
    """Runs the scripted controller with Gaussian noise on its actions.

    Returns: args.num_demos episodes, failures included. Raises: UserError if the environment has no built-in demonstrator.
    """
    controller, rng = SCRIPTED.get(args.env_id.split("-")[0]), np.random.default_rng(args.seed)
    if controller is None:
        raise UserError(
            f"{args.env_id} has no built-in demonstrator ({', '.join(SCRIPTED)} have); type --dataset with a file.npz or a Minari id, "
            "or --dataset none to start without data."
        )

    def act(obs):
        actions = np.array([controller(o) for o in obs])
        return np.clip(actions + args.demo_noise * rng.standard_normal(actions.shape), -1, 1)

    first_seed = (2 * args.seed + 1) * 10**6
    return collect_episodes(args, act, 1, range(first_seed, first_seed + args.num_demos))


REQUIRED = ("observations", "actions", "rewards", "terminals", "timeouts")  # D4RL's flat keys


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Returns: the file's columns. Raises: UserError if it is no .npz file of plain numbers."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: np.atleast_1d(file[key]) for key in (*REQUIRED, "next_observations", "success") if key in file}
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.") from error
    except Exception as error:  # a damaged file can make NumPy raise anything; Python objects could run foreign code
        raise UserError(f"{path} is damaged, not an .npz file, or holds Python objects instead of numbers ({error}).") from error


def flatten_obs(space: gym.Space, obs) -> np.ndarray:
    """Many observations of a nested space as rows (n, O), in the order of gymnasium's FlattenObservation."""
    if isinstance(space, gym.spaces.Dict):
        return np.hstack([flatten_obs(part, obs[key]) for key, part in space.items()])
    return np.asarray(obs).reshape(len(obs), -1)


def read_minari(dataset_id: str, obs_space: gym.Space) -> dict[str, np.ndarray]:
    """Returns: a Minari dataset in the columns of read_npz. Raises: UserError if it or Minari is missing, or its observations differ."""
    if not importlib.util.find_spec("minari"):
        raise UserError(f'--dataset {dataset_id} is neither built in nor an .npz file; for a Minari dataset: pip install "minari[hdf5]"')
    import minari

    try:
        episodes = list(minari.load_dataset(dataset_id, download=True).iterate_episodes())
        obs = [flatten_obs(obs_space, episode.observations) for episode in episodes]
    except Exception as error:  # not there, no network, other keys
        raise UserError(f"The Minari dataset {dataset_id} cannot be read ({type(error).__name__}: {error}).") from error
    columns = {"observations": [o[:-1] for o in obs], "next_observations": [o[1:] for o in obs]}
    columns |= {"actions": [episode.actions for episode in episodes], "rewards": [episode.rewards for episode in episodes]}
    columns["terminals"] = [episode.terminations for episode in episodes]
    columns["timeouts"] = [np.arange(len(o) - 1) == len(o) - 2 for o in obs]  # whatever did not terminate was cut off there
    for key in ("success", "is_success"):
        if all(key in (episode.infos or {}) for episode in episodes):
            columns["success"] = [np.asarray(episode.infos[key])[1 - len(o) :] for episode, o in zip(episodes, obs, strict=True)]
    return {key: np.concatenate(parts) for key, parts in columns.items()}


def load_dataset(args: Args) -> list[Trajectory]:
    """Reads --dataset: one row a step, actions in the environment's own range. Without next_observations, the row at a time limit only
    shows where the episode ended.

    Returns: the episodes that last a chunk. Raises: UserError that says what is wrong with the data.
    """
    env = make_env(args.env_id, args.chunk_size)
    box, obs_dim = env.env.action_space, env.observation_space.shape[0]
    data = read_npz(Path(args.dataset)) if args.dataset.endswith(".npz") else read_minari(args.dataset, env.unwrapped.observation_space)

    def require(condition, problem):
        if not condition:
            raise UserError(f"The dataset {args.dataset} {problem}.")

    missing, lengths = [key for key in REQUIRED if key not in data], {key: len(column) for key, column in data.items()}
    require(not missing, f"lacks {', '.join(missing)}; it has {', '.join(data) or 'nothing'}")
    require(len(set(lengths.values())) == 1, f"has columns of unequal lengths: {lengths}")
    require(lengths["rewards"], "has no rows")
    for key, column in data.items():
        require(column.dtype.kind in "biuf", f"has {key} of type {column.dtype} instead of numbers")
        data[key] = column = column.reshape(len(column), -1).astype(np.float64)
        width = {"observations": obs_dim, "next_observations": obs_dim, "actions": math.prod(box.shape)}.get(key, 1)
        require(column.shape[1] == width, f"has {key} of width {column.shape[1]}; {args.env_id} has {width}")
        bad = np.flatnonzero(~np.isfinite(column).all(1))
        require(key == "success" or not len(bad), f"has NaN or infinity in {key}, first in row {bad[:1]}")
    low, high = box.low.flatten(), box.high.flatten()
    outside = np.maximum(low - data["actions"], data["actions"] - high).max(1)
    count = (outside > 1e-4).sum()
    require(count == 0, f"has {count} of {len(outside)} actions outside {args.env_id}'s action space, by up to {outside.max():.3g}")
    actions = np.clip((data["actions"] - low) / (high - low) * 2 - 1, -1, 1)
    ends = np.flatnonzero(data["terminals"] + data["timeouts"])
    require(len(ends), "marks no end of an episode: terminals and timeouts are 0 throughout")
    episodes = []
    for rows in np.split(np.arange(ends[-1] + 1), ends[:-1] + 1):
        terminated, last_obs = bool(data["terminals"][rows[-1]]), data.get("next_observations", data["observations"])[rows[-1]]
        if "next_observations" not in data and not terminated:
            rows = rows[:-1]
        if len(rows) >= args.chunk_size:
            success = data["success"][rows, 0] if "success" in data else np.array([math.nan])
            success = success.max() if args.success_at == "any" else success[-1]
            obs = np.vstack([data["observations"][rows], last_obs])
            episodes.append(Trajectory(obs, actions[rows], data["rewards"][rows, 0], terminated, float(success), 0))
    if len(episodes) < len(ends):
        print(f"{args.dataset}: {len(ends) - len(episodes)} of {len(ends)} episodes are shorter than a chunk and left out")
    require(episodes, f"has no episode of --chunk-size {args.chunk_size} steps or more")
    return episodes


def write_dataset(args: Args, episodes: list[Trajectory]) -> None:
    """Writes episodes to --save-dataset, as load_dataset reads them. Raises: UserError if that cannot be done."""
    to_own_range, columns = make_env(args.env_id, args.chunk_size).func, defaultdict(list)
    for episode in episodes:
        last = np.arange(len(episode.rewards)) == len(episode.rewards) - 1
        columns["observations"].append(episode.obs[:-1])
        columns["next_observations"].append(episode.obs[1:])
        columns["actions"].append(np.array([to_own_range(action) for action in episode.actions]))
        columns["rewards"].append(episode.rewards)
        columns["terminals"].append(last & episode.terminated)
        columns["timeouts"].append(last & (not episode.terminated))
        columns["success"].append(np.where(last, episode.success, 0.0))
    try:
        np.savez_compressed(args.save_dataset, **{key: np.concatenate(parts) for key, parts in columns.items()})
    except OSError as error:
        raise UserError(f"{args.save_dataset} cannot be written: {error.strerror}.") from error


# Replay buffer
def average_over_ranks(tensors: list[Tensor]) -> list[Tensor]:
    """Averages in place over the processes that torchrun started, on shards of equal size. Returns: the tensors."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensors


class Batch(NamedTuple):
    """Windows of T steps, each within one episode."""

    obs: Tensor  # (B, O)
    chunk: Tensor  # (B, D), zero where not valid
    reward: Tensor  # (B,) reward_scale * sum_i gamma^i r_{t+i} over the valid steps
    next_obs: Tensor  # (B, O) after the last valid step
    terminated: Tensor  # (B,) 1 if that step terminated the episode
    valid: Tensor  # (B, T) 1 up to the end of the episode, 0 after it


class ReplayBuffer:
    """A ring of environment steps. Each knows how many steps its episode still has, so no window leaves its episode."""

    def __init__(self, capacity: int, obs_dim: int, action_dim: int, chunk_size: int, gamma: float, device: torch.device | str = "cpu"):
        self.capacity, self.chunk_size, self.gamma, self.device = capacity, chunk_size, gamma, device

        def zeros(*shape, dtype=np.float32):  # NumPy's take up no memory before they are written to
            return torch.from_numpy(np.zeros(shape, dtype)).to(device)

        self.obs, self.next_obs, self.actions = zeros(capacity, obs_dim), zeros(capacity, obs_dim), zeros(capacity, action_dim)
        self.rewards, self.terminated = zeros(capacity), zeros(capacity)
        self.steps_left = zeros(capacity, dtype=np.int64)  # in the episode, this one included
        self.columns = self.obs, self.next_obs, self.actions, self.rewards, self.terminated, self.steps_left
        self.position, self.size, self.reward_scale = 0, 0, 1.0

    def add_episode(self, episode: Trajectory) -> None:
        """Writes an episode over the oldest steps; of one longer than the buffer the end is kept."""
        n, kept = len(episode.actions), min(len(episode.actions), self.capacity)
        rows = (self.position + torch.arange(n, device=self.device))[-kept:] % self.capacity
        left = np.arange(n, 0, -1)
        values = episode.obs[:-1], episode.obs[1:], episode.actions, episode.rewards, (left == 1) * episode.terminated, left
        for column, value in zip(self.columns, values, strict=True):
            column[rows] = torch.as_tensor(value[-kept:], dtype=column.dtype, device=self.device)
        self.position, self.size = (self.position + n) % self.capacity, min(self.size + n, self.capacity)

    def draw(self, batch_size: int) -> Tensor:
        """Returns: rows (B,), uniform over the buffer."""
        return torch.randint(self.size, (batch_size,), device=self.device)

    def windows(self, start: Tensor) -> Batch:
        """The windows that begin at these rows (B,)."""
        step = torch.arange(self.chunk_size, device=self.device)
        valid = (step < self.steps_left[start, None]).float()  # (B, T)
        rows = (start[:, None] + step) % self.capacity
        last = (start + valid.sum(1).long() - 1) % self.capacity
        chunk = (self.actions[rows] * valid[..., None]).flatten(1)
        reward = (self.reward_scale * self.rewards[rows] * valid * self.gamma**step).sum(1)
        return Batch(self.obs[start], chunk, reward, self.next_obs[last], self.terminated[last], valid)

    def unit_reward_scale(self) -> float:
        """1 / the largest |reward|, so that Q, and what is measured in its units, does not depend on the environment's."""
        (largest,) = average_over_ranks([self.rewards[: self.size].abs().max()])
        return 1 / largest.item() if largest > 0 else 1.0

    def state_dict(self) -> dict:
        columns = [column[: self.size].clone() for column in self.columns]
        return {"position": self.position, "size": self.size, "reward_scale": self.reward_scale, "columns": columns}

    def load_state_dict(self, state: dict) -> None:
        self.position, self.size, self.reward_scale = state["position"], state["size"], state["reward_scale"]
        for column, values in zip(self.columns, state["columns"], strict=True):
            column[: self.size] = values


# Flow policy
class Normalizer(nn.Module):
    """Shifts and scales observations by statistics that travel in the state dict."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    def fit(self, obs: Tensor) -> None:
        """Takes the statistics of obs (n, O), of all ranks together; a feature that is constant there is only shifted."""
        std, mean = torch.std_mean(obs, dim=0, correction=0)
        (self.mean,) = average_over_ranks([mean.clone()])
        (variance,) = average_over_ranks([std**2 + (mean - self.mean) ** 2])
        self.std = torch.where(variance < 1e-8, 1.0, variance.sqrt())

    def forward(self, obs: Tensor) -> Tensor:
        return ((obs - self.mean) / self.std).clamp(-10, 10)


def in_blocks(net: Callable, rows: Tensor) -> Tensor:
    """net(rows), on a CPU in blocks whose activations stay in its cache. Args: rows (..., B, in). Returns: (..., B, out)."""
    size = math.ceil(2048 / math.prod(rows.shape[:-2])) if rows.device.type == "cpu" else rows.shape[-2]
    return torch.cat([net(block) for block in rows.split(size, dim=-2)], dim=-2)


class FlowPolicy(nn.Module):
    """Flow matching over action chunks along straight lines from noise (t = 0) to chunk (t = 1)."""

    def __init__(self, obs_dim: int, chunk_dim: int, hidden_dim: int = 256, flow_steps: int = 5):
        super().__init__()
        self.chunk_dim, self.flow_steps = chunk_dim, flow_steps
        self.normalize = Normalizer(obs_dim)
        widths = [obs_dim + chunk_dim + 1] + [hidden_dim] * 3
        hidden = [layer for i, o in itertools.pairwise(widths) for layer in (nn.Linear(i, o), nn.SiLU())]
        self.net = nn.Sequential(*hidden, nn.Linear(hidden_dim, chunk_dim))

    def velocity(self, obs: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Velocity v(x, t, s) of the flow. Args: obs (B, O), x (B, D), t (B, 1) in [0, 1]. Returns: (B, D)."""
        return in_blocks(self.net, torch.cat([self.normalize(obs), x, t], dim=1))

    def bc_loss(self, obs: Tensor, chunk: Tensor, valid: Tensor | None, noise: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """Flow-matching loss L_BC: squared error of the velocity, averaged over the valid entries of each chunk.

        Args: obs (B, O); chunk (B, D) in [-1, 1]; valid (B, T), None for all; noise x_0 (B, D) and time (B, 1), drawn if None.
        Returns: (B,).
        """
        x_0 = torch.randn_like(chunk) if noise is None else noise
        t = torch.rand_like(chunk[:, :1]) if time is None else time
        x_t = (1 - t) * x_0 + t * chunk
        error = (self.velocity(obs, x_t, t) - (chunk - x_0)) ** 2  # (B, D)
        if valid is None:
            return error.mean(1)
        mask = valid.repeat_interleave(chunk.shape[1] // valid.shape[1], dim=1)  # (B, D)
        return (error * mask).sum(1) / mask.sum(1).clamp(min=1)

    def sample(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """Follows the flow in K Euler steps. Args: obs (B, O); noise x_0 (B, D), drawn if None. Returns: chunks (B, D) in [-1, 1]."""
        x = torch.randn(len(obs), self.chunk_dim, device=obs.device) if noise is None else noise
        for k in range(self.flow_steps):
            t = torch.full_like(x[:, :1], k / self.flow_steps)
            x = x + self.velocity(obs, x, t) / self.flow_steps
        return x.clamp(-1, 1)


# Critic
class EnsembleLinear(nn.Module):
    """M linear layers in one batched product, initialised as nn.Linear is."""

    def __init__(self, num_critics: int, in_dim: int, out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_critics, in_dim, out_dim).uniform_(-(in_dim**-0.5), in_dim**-0.5))
        self.bias = nn.Parameter(torch.empty(num_critics, 1, out_dim).uniform_(-(in_dim**-0.5), in_dim**-0.5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias, x, self.weight)  # (M, B, in) -> (M, B, out)


class CriticEnsemble(nn.Module):
    """M independent chunk values Q(s, chunk), MLPs with LayerNorm in the hidden layers."""

    def __init__(self, obs_dim: int, chunk_dim: int, num_critics: int, hidden_dim: int = 256):
        super().__init__()
        self.num_critics = num_critics
        self.normalize = Normalizer(obs_dim)
        layers = []
        for i, o in itertools.pairwise([obs_dim + chunk_dim] + [hidden_dim] * 3):
            layers += [EnsembleLinear(num_critics, i, o), nn.LayerNorm(o, elementwise_affine=False), nn.SiLU()]
        self.net, self.head = nn.Sequential(*layers), EnsembleLinear(num_critics, hidden_dim, 1)

    def forward(self, obs: Tensor, chunk: Tensor) -> Tensor:
        """Args: obs (B, O), chunk (B, D). Returns: Q (M, B)."""
        x = torch.cat([self.normalize(obs), chunk], dim=1)
        return in_blocks(self.value, x.expand(self.num_critics, -1, -1)).squeeze(2)

    def value(self, x: Tensor) -> Tensor:
        """Args: inputs of the networks (M, B, O + D). Returns: (M, B, 1)."""
        hidden = self.net(x)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 cannot tell -20.0 from -20.06
            return self.head(hidden.float())


# The algorithm
def aggregate(q: Tensor, how: str) -> Tensor:
    """One value from the ensemble's. Args: q (M, ...); how, "mean" or "min". Returns: (...)."""
    return q.mean(0) if how == "mean" else q.amin(0)


def td_target(reward: Tensor, next_q: Tensor, terminated: Tensor, gamma: float, chunk_size: int) -> Tensor:
    """T-step target y = sum_i gamma^i r_{t+i} + gamma^T (1 - terminated) Q(s_{t+T}, chunk'), chunk' from the policy.

    Args: reward (B,), the discounted sum; next_q (B,), aggregated target value; terminated (B,), 0 for a time limit. Returns: (B,).
    """
    return reward + gamma**chunk_size * (1 - terminated) * next_q


def critic_loss(q: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Squared TD error over whole windows, since a padded one was never executed. Args: q (M, B), target (B,), valid (B, T)."""
    whole = valid[:, -1]
    return ((q - target) ** 2 * whole).sum() / (len(q) * whole.sum().clamp(min=1))


def reduce_next_q(next_q: Tensor, how: str) -> Tensor:
    """Q-variance reduction: one value from those of several next chunks. Args: next_q (B, n); how, "mean" or "median". Returns: (B,)."""
    return next_q.mean(1) if how == "mean" else next_q.quantile(0.5, dim=1)


def chain_step(policy, obs: Tensor, x: Tensor, t: Tensor, sigma: float) -> torch.distributions.Normal:
    """One stochastic Euler step of the flow, the distribution of x_{k+1} given x_k. The drift is corrected by (sigma_t^2 / 2) * score with
    sigma_t = sigma sqrt(1 - t) and score = (t v - x) / (1 - t), so the marginals stay those of the ODE for every sigma.

    Args: obs (B, O); x (B, D); t (B, 1) in [0, 1). Returns: a Normal of (B, D).
    """
    dt = 1 / policy.flow_steps
    v = policy.velocity(obs, x, t)
    mean = x + dt * (v + sigma**2 / 2 * (t * v - x))  # 1 - t cancels
    return torch.distributions.Normal(mean, sigma * torch.sqrt((1 - t) * dt), validate_args=False)


@torch.no_grad()
def sample_chain(policy, obs: Tensor, sigma: float, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draws the denoising chain x_0, ..., x_K of the stochastic sampler; sigma 0 gives the ODE's, which has no density.

    Args: policy, anything with velocity, flow_steps and chunk_dim; obs (B, O); noise x_0 (B, D), drawn if None.
    Returns: chain (K + 1, B, D), its chain_log_prob (B,).
    """
    chain, log_probs = [torch.randn(len(obs), policy.chunk_dim, device=obs.device) if noise is None else noise], []
    for k in range(policy.flow_steps):
        step = chain_step(policy, obs, chain[-1], torch.full_like(chain[0][:, :1], k / policy.flow_steps), sigma)
        chain.append(step.mean + step.stddev * torch.randn_like(step.mean))  # step.sample() would wait for a GPU
        log_probs.append(step.log_prob(chain[-1]).mean(1))
    return torch.stack(chain), torch.stack(log_probs).mean(0)


def chain_log_prob(policy, obs: Tensor, chain: Tensor, sigma: float) -> Tensor:
    """Log density of the chain's steps given x_0, averaged over the K steps and the D numbers of a chunk, all in one batched call.

    Args: obs (B, O); chain (K + 1, B, D); sigma > 0. Returns: (B,).
    """
    steps, n, dim = len(chain) - 1, *chain.shape[1:]
    t = torch.arange(steps, device=chain.device).repeat_interleave(n)[:, None].to(chain) / steps  # (K * B, 1)
    step = chain_step(policy, obs.repeat(steps, 1), chain[:-1].reshape(-1, dim), t, sigma)
    return step.log_prob(chain[1:].reshape(-1, dim)).mean(1).view(steps, n).mean(0)


def group_advantage(q: Tensor, conservative: bool) -> Tensor:
    """Advantage over the group's mean, A_m,j = Q_m,j - mean_j Q_m,j. Plain: the critics' mean. Conservative (OGPO+CA): the value
    nearest to zero where all critics agree on the sign, zero where they do not.

    Args: q (M, B, G). Returns: (B, G).
    """
    advantage = q - q.mean(2, keepdim=True)
    if conservative:
        return advantage.amin(0).clamp(min=0) + advantage.amax(0).clamp(max=0)  # at most one of the two is not zero
    return advantage.mean(0)


def chi2_penalised_q(q: Tensor, ratio: Tensor, coef: float, sharpness: float) -> Tensor:
    """Value of chains that leave the slow policy: (1 - w) mean_m Q + w min_m Q - b ratio, w = sigmoid(a (ratio - 1)), b = coef * std_m Q.

    Args: q (M, B, G); ratio (B, G) of the chain's probabilities, new over slow policy; coef; sharpness a. Returns: (B, G).
    """
    weight = torch.sigmoid(sharpness * (ratio - 1))
    return (1 - weight) * q.mean(0) + weight * q.amin(0) - coef * q.std(0, correction=0) * ratio


def ppo_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, clip_epsilon: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate -mean min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) with ratio = exp(log_prob - old_log_prob).

    Args: all three (...,). Returns: a scalar, metrics.
    """
    ratio = (log_prob - old_log_prob).exp()
    loss = -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon) * advantage).mean()
    outside = (ratio.detach() - 1).abs() > clip_epsilon
    return loss, {"losses/clip_fraction": outside.float().mean(), "losses/ratio_std": ratio.detach().std()}


def gradient_step(optimizer: torch.optim.Adam, loss: Tensor) -> Tensor:
    """One step of fused Adam on the gradient, averaged over the ranks; one that is not finite changes no weight. Returns: its norm."""
    optimizer.zero_grad()
    loss.backward()
    gradients = average_over_ranks([parameter.grad for parameter in optimizer.param_groups[0]["params"]])
    norm = nn.utils.get_total_norm(gradients)
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # the kernel looks at it, so that nobody has to wait for the device
    optimizer.step()
    return norm


def update_critic(policy, critic, target_critic, optimizer, batch: Batch, args: Args) -> dict[str, Tensor]:
    """One TD step on chunks, then a Polyak step of the targets. Returns: metrics."""
    with torch.no_grad(), mixed_precision(args, batch.obs.device):
        next_obs = batch.next_obs.repeat_interleave(args.next_samples, dim=0)
        next_q = aggregate(target_critic(next_obs, policy.sample(next_obs)), args.q_aggregation)
        next_q = reduce_next_q(next_q.view(-1, args.next_samples), args.next_reduction)
        target = td_target(batch.reward, next_q, batch.terminated, args.gamma, args.chunk_size)
    with mixed_precision(args, batch.obs.device):
        q = critic(batch.obs, batch.chunk)  # (M, B)
    loss = critic_loss(q, target, batch.valid)
    grad_norm = gradient_step(optimizer, loss)
    with torch.no_grad():
        torch._foreach_lerp_(list(target_critic.parameters()), list(critic.parameters()), args.tau)
    return {"losses/qf_loss": loss.detach(), "losses/qf_values": q.detach().mean(), "losses/qf_grad_norm": grad_norm}


def update_policy(policy, old_policy, slow_policy, target_critic, optimizer, batch: Batch, success: Batch, args: Args) -> dict[str, Tensor]:
    """One OGPO step: draw groups of chains from the old policy, PPO on their values, cloning of successes. Returns: metrics."""
    n = args.group_size
    obs = batch.obs[: args.ppo_batch_size].repeat_interleave(n, dim=0)  # (B * G, O)
    with torch.no_grad(), mixed_precision(args, obs.device):
        chain, old_log_prob = sample_chain(old_policy, obs, args.sigma)  # (K + 1, B * G, D), (B * G,)
        q = target_critic(obs, chain[-1].clamp(-1, 1)).view(args.num_critics, -1, n)
    with mixed_precision(args, obs.device):
        log_prob = chain_log_prob(policy, obs, chain, args.sigma)
        if args.chi2_coef:
            with torch.no_grad():
                ratio = (log_prob - chain_log_prob(slow_policy, obs, chain, args.sigma)).exp().view(-1, n)
                q = q + chi2_penalised_q(q, ratio, args.chi2_coef, args.chi2_sharpness) - q.mean(0)  # members stay apart
        advantage = group_advantage(q, args.conservative)
        loss, metrics = ppo_loss(log_prob, old_log_prob, advantage.flatten(), args.clip_epsilon)
        if args.success_coef:
            bc_loss = policy.bc_loss(success.obs, success.chunk, success.valid).mean()
            loss, metrics["losses/bc_loss"] = loss + args.success_coef * bc_loss, bc_loss.detach()
    metrics["losses/actor_grad_norm"] = gradient_step(optimizer, loss)
    with torch.no_grad():
        for network, tau in ((old_policy, args.policy_tau), (slow_policy, args.chi2_tau)):
            torch._foreach_lerp_(list(network.parameters()), list(policy.parameters()), tau)
    return metrics | {
        "losses/actor_loss": loss.detach(),
        "losses/zero_advantages": (advantage == 0).float().mean(),
        "losses/group_q_std": q.mean(0).std(1, correction=0).mean(),
    }


# Evaluation
@torch.no_grad()
def choose_chunks(policy, critic, best_of_n: int, generator: torch.Generator, obs: np.ndarray) -> np.ndarray:
    """Samples n chunks for each observation (E, O) and takes the best by the critics. Returns: (E, D)."""
    device = policy.normalize.mean.device
    obs = torch.as_tensor(obs, dtype=torch.float32, device=device).repeat_interleave(best_of_n, dim=0)
    noise = torch.randn(len(obs), policy.chunk_dim, generator=generator).to(device)  # the same on every device
    chunks = policy.sample(obs, noise)
    best = critic(obs, chunks).mean(0).view(-1, best_of_n).argmax(1, keepdim=True)  # (E, 1)
    return chunks.view(len(best), best_of_n, -1).take_along_dim(best[..., None], dim=1).squeeze(1).cpu().numpy()


def evaluate(policy, critic, args: Args, best_of_n: int, num_episodes: int, *show) -> dict[str, float]:
    """Runs the policy on episodes with the seeds 0, 1, ..., the same for all runs; show as in collect_episodes.

    Returns: success, return and completed tasks, means over the episodes.
    """
    act = partial(choose_chunks, policy, critic, best_of_n, torch.Generator().manual_seed(0))
    episodes = collect_episodes(args, act, args.chunk_size, range(num_episodes), *show)
    success = [episode.success for episode in episodes]
    mean_return, tasks = np.mean([(episode.rewards.sum(), episode.tasks) for episode in episodes], axis=0).tolist()
    result = {"success": float(np.mean(success)), "successes": sum(success), "episodes": num_episodes, "return": mean_return}
    return result if math.isnan(tasks) else result | {"tasks": tasks}


def result_line(result: dict[str, float]) -> str:
    """What evaluate returns, as a line to print; the mean return where the environment reports no success."""
    if math.isnan(result["success"]):
        return f"mean return {result['return']:.1f} (the environment reports no success)"
    tasks = f", {result['tasks']:.2f} tasks completed" if "tasks" in result else ""
    return f"success {result['success']:.2f} ({result['successes']:.0f}/{result['episodes']}){tasks}, mean return {result['return']:.1f}"


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a success rate."""
    z, p = 1.959964, successes / n
    centre, half_width = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (centre - half_width) / (1 + z**2 / n), (centre + half_width) / (1 + z**2 / n)


# Checkpoint
FORMAT = 1
MAY_CHANGE = {  # when a run is resumed
    "total_timesteps", "eval_interval", "eval_episodes", "log_interval", "checkpoint_interval", "resume",
    "device", "torch_threads", "bf16", "compile", "cudagraphs",
    "tensorboard", "track", "wandb_project_name", "wandb_entity", "capture_video", "save_dataset",
}  # fmt: skip


def make_networks(args: Args, device: torch.device) -> tuple[FlowPolicy, CriticEnsemble]:
    """Policy and critics of the sizes that the environment and args ask for. Raises: UserError if they do not fit into memory."""
    env = make_env(args.env_id, args.chunk_size)
    (obs_dim,), (action_dim,) = env.observation_space.shape, env.action_space.shape
    env.close()
    try:
        policy = FlowPolicy(obs_dim, args.chunk_size * action_dim, args.hidden_dim, args.flow_steps)
        critic = CriticEnsemble(obs_dim, args.chunk_size * action_dim, args.num_critics, args.hidden_dim)
        return policy.to(device), critic.to(device)
    except (RuntimeError, MemoryError, OverflowError, TypeError) as error:  # torch has several names for it
        raise UserError(f"--hidden-dim {args.hidden_dim} and --num-critics {args.num_critics} do not fit into memory.") from error


def make_buffer(policy: FlowPolicy, args: Args, device: torch.device) -> ReplayBuffer:
    """An empty buffer for the policy's observations and chunks. Raises: UserError if it is larger than the memory."""
    action_dim = policy.chunk_dim // args.chunk_size
    try:
        return ReplayBuffer(args.buffer_size, len(policy.normalize.mean), action_dim, args.chunk_size, args.gamma, device)
    except (RuntimeError, MemoryError, OverflowError, TypeError, ValueError) as error:
        raise UserError(f"--buffer-size {args.buffer_size} does not fit into memory.") from error


def write_file(path: Path, data: bytes) -> None:
    """Writes data; an older file stays until the new one is whole and on the disk."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def save_file(path: Path, args: Args, content: dict) -> None:
    """Writes content beside method and arguments."""
    data = io.BytesIO()
    torch.save({"format": FORMAT, "method": METHOD, "args": asdict(args) | {"resume": None}} | content, data)
    write_file(path, data.getbuffer())


@contextlib.contextmanager
def fitting(path: Path, what: str) -> Iterator[None]:
    """Turns whatever a file's wrong content raises into a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{path} does not fit this {METHOD}.py: {what} is missing or has other names, shapes or values.") from error


def read_file(path: Path, device: torch.device) -> tuple[Args, dict]:
    """Returns: a run's arguments, and what save_file was given. Raises: UserError if the file is not whole or not of this script."""
    if not path.is_file():
        raise UserError(f"There is no file {path}.")
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # torch does not compare the checksums
                raise ValueError("a checksum is wrong")
        content = torch.load(path, map_location=device, weights_only=True)  # never unpickles arbitrary objects
        written_by, args = (content["method"], content["format"]), content["args"] | {"device": "auto"}  # it may come from a GPU
    except Exception as error:  # a damaged file can make torch raise anything
        raise UserError(f"{path} is damaged or not a file of this script ({type(error).__name__}).") from error
    if written_by != (METHOD, FORMAT):
        raise UserError(f"{path} was written by {written_by[0]}.py, format {written_by[1]}, and not by {METHOD}.py, format {FORMAT}.")
    with fitting(path, "its arguments"):
        args = Args(**args)
        check_args(replace(args, **dict.fromkeys(OPTIONAL, False)))  # what it was trained with need not be installed here
    return args, content


def load_policy(path: Path, device: torch.device) -> tuple[Args, FlowPolicy, CriticEnsemble]:
    """Returns: a run's arguments, policy and critics. Raises: UserError if the file is not a whole policy file of this script."""
    args, content = read_file(path, device)
    policy, critic = make_networks(args, device)
    for name, network in (("policy", policy), ("critic", critic)):
        with fitting(path, name):
            network.load_state_dict(content[name])
    return args, policy, critic


def evaluate_file(args: Args, device: torch.device) -> dict[str, float]:
    """What --evaluate does. Returns: the result, which is also printed."""
    saved, policy, critic = load_policy(args.evaluate, device)
    if args.env_id not in (None, saved.env_id):
        raise UserError(f"{args.evaluate} is a policy for {saved.env_id} and not for {args.env_id}.")
    if args.capture_video:
        check_rendering(saved)
        evaluate(policy, critic, saved, saved.best_of_n, 3, "rgb_array", args.evaluate.parent / "videos" / "evaluate")
    for best_of_n in sorted({1, saved.best_of_n}):
        result = evaluate(policy, critic, saved, best_of_n, FINAL_EPISODES, *["human"] * args.render)
        print(f"{saved.env_id}, {f'best of {best_of_n}' if best_of_n > 1 else 'ODE policy'}: {result_line(result)}")
    return result


def resumed_args(args: Args, typed: list[str] | None = None) -> Args:
    """The arguments of the run in args.resume, with what is typed beside --resume. Raises: UserError if that would be another run."""
    if (args.resume / "checkpoint.pt").is_file():
        saved, _ = read_file(args.resume / "checkpoint.pt", torch.device("cpu"))
    else:  # it was stopped before its first checkpoint, and begins again
        with fitting(args.resume / "args.json", "the file"):
            saved = Args(**json.loads((args.resume / "args.json").read_text()))
    saved.resume = args.resume
    args = tyro.cli(Args, default=saved, args=typed)
    for name, value in vars(saved).items():
        if name not in MAY_CHANGE and getattr(args, name) != value:
            raise UserError(f"--{name.replace('_', '-')} was {value} in {args.resume} and cannot become {getattr(args, name)}.")
    return args


# Training
FINAL_EPISODES = 100
COLUMNS = (
    "global_step", "eval/success", "eval/return", "eval/ode_success", "eval/tasks",
    "charts/success", "charts/episodic_return", "charts/episodic_length", "charts/buffer_size",
    "losses/qf_loss", "losses/qf_values", "losses/actor_loss", "losses/qf_grad_norm", "losses/actor_grad_norm", "losses/bc_loss",
    "losses/clip_fraction", "losses/ratio_std", "losses/zero_advantages", "losses/group_q_std",
)  # fmt: skip


def trackers(args: Args, folder: Path) -> Iterator[Callable]:
    """Functions of (means, step) for each optional tracker that args ask for."""
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(folder))
        yield lambda means, step: [writer.add_scalar(name, value, step) for name, value in means.items()] and writer.flush()
    if args.track:
        import wandb

        name, account = folder.name, {"project": args.wandb_project_name, "entity": args.wandb_entity}
        run = wandb.init(**account, name=name, id=name, resume="allow", config=asdict(args), dir=str(folder))
        yield lambda means, step: run.log(means, step=step)


class RunLog:
    """The folder of a run: args.json, metrics.csv with the means since the row before, wall_time.csv; the policies and summary.json."""

    def __init__(self, args: Args, start_time: float, texts: dict[str, str] | None):
        self.start_time, self.sums, self.counts, self.dir = start_time, {}, Counter(), args.resume
        texts = texts or {"metrics.csv": ",".join(COLUMNS) + "\n", "wall_time.csv": "global_step,seconds\n"}
        texts = {"args.json": json.dumps(asdict(args) | {"resume": None}, indent=2)} | texts
        try:
            while self.dir is None:
                name = f"{args.env_id}__{METHOD}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}"
                folder = Path("runs") / name.replace("/", "-").replace(":", "-")
                try:
                    folder.mkdir(parents=True)
                    self.dir = folder
                except FileExistsError:  # of another run that began in this second
                    time.sleep(1)
            self.lock = open(self.dir / "lock", "w")
            if fcntl:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name, text in texts.items():
                write_file(self.dir / name, text.encode())
            self.trackers = list(trackers(args, self.dir))
        except BlockingIOError as error:
            raise UserError(f"{self.dir} belongs to a run that is still going on.") from error
        except OSError as error:
            raise UserError(f"The folder {self.dir or 'runs'} cannot be written: {error.strerror}.") from error

    def record(self, values: dict[str, float | Tensor]) -> None:
        for name, value in values.items():  # summed where they are: .item() would wait for the device
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] += 1

    def write_row(self, step: int) -> dict[str, float]:
        """Writes and returns the means."""
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        self.sums, self.counts = {}, Counter()
        with open(self.dir / "metrics.csv", "a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow({"global_step": step} | means)
        with open(self.dir / "wall_time.csv", "a") as file:  # apart, so that equal runs have equal metrics
            file.write(f"{step},{time.time() - self.start_time:.1f}\n")
        for tracker in self.trackers:
            tracker(means, step)
        return means


def check_finite(means: dict[str, float]) -> None:
    """Raises: RunError if a loss or a gradient was NaN or infinite since the row before; gradient_step has kept it from the weights."""
    for name, value in means.items():
        if name.startswith("losses/") and not math.isfinite(value):
            raise RunError(f"{name} became NaN or infinite")


@torch.compiler.assume_constant_result
def has_bfloat16(device_type: str) -> bool:
    """Whether the processor multiplies bfloat16 matrices in hardware."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))


def mixed_precision(args: Args, device: torch.device) -> torch.autocast:
    """bfloat16 for matrix products where args and the processor have it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16 and has_bfloat16(device.type))


def accelerate(update: Callable, args: Args) -> Callable:
    """update(*tensors) -> metrics: compiled with --compile; with --cudagraphs recorded once, then replayed without Python."""
    update = torch.compile(update) if args.compile else update
    if args.cudagraphs:
        from tensordict.nn import CudaGraphModule

        update = CudaGraphModule(update, warmup=4)  # before that, Adam's state and the libraries' workspaces come into being
    return update


def behaviour_cloning(policy, critic, optimizer, buffer: ReplayBuffer, args: Args, log: RunLog) -> None:
    """Fits the policy to the buffer by its flow-matching loss, up to --bc-success-cap."""
    below_cap = copy.deepcopy(policy.state_dict())
    for step in tqdm(range(1, args.bc_steps + 1), desc="behaviour cloning", leave=False):
        batch = buffer.windows(buffer.draw(args.batch_size))
        loss = policy.bc_loss(batch.obs, batch.chunk, batch.valid).mean()
        log.record({"losses/bc_loss": loss.detach(), "losses/actor_grad_norm": gradient_step(optimizer, loss)})
        if args.bc_success_cap < 1 and (step % max(args.bc_steps // 10, 1) == 0 or step == args.bc_steps):
            if evaluate(policy, critic, args, 1, FINAL_EPISODES)["success"] > args.bc_success_cap:
                tqdm.write(f"cloning went above --bc-success-cap by step {step}: back to the evaluation before that")
                policy.load_state_dict(below_cap)
                break
            below_cap = copy.deepcopy(policy.state_dict())


def main(args: Args) -> dict:
    """Trains, or evaluates a file. Returns: the summary. Raises: UserError, and after saving KeyboardInterrupt and RunError."""
    start_time = time.time()
    check_args(args)
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    if args.evaluate:
        return evaluate_file(args, device)
    if args.capture_video:
        check_rendering(args)
    checkpoint_path = args.resume / "checkpoint.pt" if args.resume else None
    checkpoint = read_file(checkpoint_path, device)[1] if args.resume and checkpoint_path.is_file() else None

    # data parallel: torchrun starts ranks with equal weights; each has its own environments, noise and part of the data
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    longest = (make_env(args.env_id, args.chunk_size).spec.max_episode_steps or 1) * args.num_envs * num_ranks
    if args.checkpoint_interval < longest:
        raise UserError(f"--checkpoint-interval {args.checkpoint_interval}: the longest episodes take {longest} steps, so none would end.")
    if cuda:
        torch.cuda.set_device(device)
    if num_ranks > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    torch.manual_seed(args.seed)
    policy, critic = make_networks(args, device)
    if rank:  # the first one evaluates, logs and saves
        scratch = tempfile.TemporaryDirectory()
        quiet = {"tensorboard": False, "track": False, "capture_video": False}
        args = replace(args, seed=args.seed + 1000 * rank, resume=Path(scratch.name), **quiet)
        torch.manual_seed(args.seed)
        sys.stdout, tqdm.__init__ = open(os.devnull, "w"), partialmethod(tqdm.__init__, disable=True)

    target_critic, adam = copy.deepcopy(critic), partial(torch.optim.Adam, fused=True, capturable=args.cudagraphs)
    old_policy, slow_policy = copy.deepcopy(policy), copy.deepcopy(policy)
    critic_optimizer = adam(critic.parameters(), lr=args.learning_rate)
    policy_optimizer = adam(policy.parameters(), lr=args.ppo_learning_rate)
    buffer, success_buffer = make_buffer(policy, args, device), make_buffer(policy, args, device)  # no expert data in either
    learner = {"policy": policy, "critic": critic, "target_critic": target_critic, "buffer": buffer, "success_buffer": success_buffer}
    learner |= {"policy_optimizer": policy_optimizer, "critic_optimizer": critic_optimizer}
    learner |= {"old_policy": old_policy, "slow_policy": slow_policy}
    acting = torch.Generator().manual_seed(args.seed)
    progress, summary, texts = {"env_steps": 0, "episodes": 0, "learning": False}, {}, None
    if checkpoint:
        with fitting(checkpoint_path, "its state"):
            state, texts = checkpoint["ranks"][rank], checkpoint["texts"]
            for name, part in learner.items():
                part.load_state_dict(state[name])
            torch.set_rng_state(state["random"].cpu())
            acting.set_state(state["acting"].cpu())
            progress, summary = state["progress"], state["summary"]
            start_time -= summary["wall_time_s"]
    demos = []
    if args.dataset != "none" and not checkpoint:
        demos = make_demonstrations(args) if args.dataset == "scripted" else load_dataset(args)[rank::num_ranks]
        if args.save_dataset and not rank:
            write_dataset(args, demos)
    log = RunLog(args, start_time, texts)

    def evaluate_and_save(num_episodes):
        step = progress["env_steps"]
        single = evaluate(policy, target_critic, args, 1, num_episodes)
        choosing = args.best_of_n > 1 and step > 0  # at the start the critics know nothing
        result = evaluate(policy, target_critic, args, args.best_of_n, num_episodes) if choosing else single
        tqdm.write(f"step {step:>7}: {result_line(result)}" + f"; ODE policy {single['success']:.2f}" * choosing)
        if args.capture_video:
            evaluate(policy, target_critic, args, args.best_of_n, 3, "rgb_array", log.dir / "videos" / f"step{step}")
        log.record({"eval/success": result["success"], "eval/return": result["return"], "eval/ode_success": single["success"]})
        log.record({"eval/tasks": result["tasks"]} if "tasks" in result else {})
        save_policy("policy.pt")
        summary.setdefault("bc_success", result["success"])
        summary["final_success"], summary["final_return"] = result["success"], result["return"]
        summary["final_success_interval"] = wilson_interval(result["successes"], result["episodes"])
        score = [float(np.nan_to_num(result["success"])), result["return"]]  # without success the return decides
        if score >= progress.get("best", score):
            progress["best"], summary["best_success"], summary["best_step"] = score, result["success"], step
            save_policy("policy_best.pt")

    def save_policy(name):
        save_file(log.dir / name, args, {"policy": policy.state_dict(), "critic": target_critic.state_dict()})

    def save_checkpoint():
        summary["wall_time_s"] = round(time.time() - log.start_time, 1)
        state = {name: part.state_dict() for name, part in learner.items()} | {"progress": progress, "summary": summary}
        state |= {"random": torch.get_rng_state(), "acting": acting.get_state()}
        states = [state] * num_ranks
        if num_ranks > 1:
            dist.gather_object(state, None if rank else states)
        texts = {name: (log.dir / name).read_text() for name in ("metrics.csv", "wall_time.csv")}
        save_file(log.dir / "checkpoint.pt", args, {"ranks": states, "texts": texts})

    def fit_scales(data):
        for network in (policy, old_policy, slow_policy, critic, target_critic):
            network.normalize.fit(data.obs[: data.size])
        buffer.reward_scale = args.reward_scale or data.unit_reward_scale()

    def critic_step(start):
        return update_critic(policy, critic, target_critic, critic_optimizer, buffer.windows(start), args)

    def policy_step(success_source, start, success_start):
        batch, success = buffer.windows(start), success_source.windows(success_start)
        return update_policy(policy, old_policy, slow_policy, target_critic, policy_optimizer, batch, success, args)

    critic_step = accelerate(critic_step, args)
    policy_steps = {source: accelerate(partial(policy_step, source), args) for source in (buffer, success_buffer)}

    interruption = None
    try:
        # offline: clone the demonstrations
        if not checkpoint:
            if demos:
                print(f"demonstrations: {len(demos)} episodes, success {np.mean([episode.success for episode in demos]):.2f}")
                demo_buffer = make_buffer(policy, args, device)
                for episode in demos:
                    demo_buffer.add_episode(episode)
                fit_scales(demo_buffer)
                optimizer = adam(policy.parameters(), lr=args.learning_rate)  # PPO starts with one of its own
                behaviour_cloning(policy, critic, optimizer, demo_buffer, args, log)
                for network in (old_policy, slow_policy):
                    network.load_state_dict(policy.state_dict())
            if rank == 0:
                evaluate_and_save(FINAL_EPISODES)
            check_finite(log.write_row(0))
            save_checkpoint()

        # online: act, evaluate actions, improve the policy
        act = partial(choose_chunks, policy, target_critic, args.best_of_n, acting)
        make = partial(make_env, args.env_id, args.chunk_size, args.success_at)
        bar = tqdm(total=args.total_timesteps, initial=progress["env_steps"], unit="step")
        while progress["env_steps"] < args.total_timesteps:
            # after a checkpoint the environments begin anew, as they do in a resumed run, so that their states need not be saved
            seeds = itertools.count((2 * args.seed + 2) * 10**6 + progress["episodes"])
            for finished in rollout(make, args.num_envs, act, args.chunk_size, seeds):
                for episode in finished:
                    buffer.add_episode(episode)
                    if episode.success == 1:
                        success_buffer.add_episode(episode)
                    progress["episodes"] += 1
                    charts = {"success": episode.success, "episodic_return": episode.rewards.sum(), "episodic_length": len(episode.rewards)}
                    log.record({f"charts/{name}": value for name, value in charts.items()})
                previous, step = progress["env_steps"], progress["env_steps"] + args.num_envs * num_ranks
                progress["env_steps"] = step
                bar.update(step - previous)
                if not progress["learning"]:  # begins when every rank has a batch
                    (ready,) = average_over_ranks([torch.tensor(float(buffer.size >= args.batch_size), device=device)])
                    progress["learning"] = bool(ready == 1)
                    if progress["learning"] and args.dataset == "none":
                        fit_scales(buffer)
                if progress["learning"]:
                    for _ in range(int(step * args.utd_ratio) - int(previous * args.utd_ratio)):
                        start = buffer.draw(args.batch_size)
                        log.record(critic_step(start))
                        if step > args.critic_warmup_steps:
                            source = success_buffer if success_buffer.size >= args.batch_size else buffer
                            log.record(policy_steps[source](start, start if source is buffer else source.draw(args.batch_size)))

                def due(interval, step=step, previous=previous):
                    return step >= args.total_timesteps or step // interval > previous // interval

                if due(args.eval_interval) and rank == 0:
                    evaluate_and_save(FINAL_EPISODES if step >= args.total_timesteps else args.eval_episodes)
                if due(args.log_interval) or due(args.checkpoint_interval):  # a checkpoint holds no half of a row
                    log.record({"charts/buffer_size": buffer.size})
                    means = log.write_row(step)
                    bar.set_postfix(success=means.get("charts/success", math.nan), Q=means.get("losses/qf_values", math.nan))
                    check_finite(means)
                    if means.get("charts/episodic_length", math.inf) < args.chunk_size:
                        raise RunError(f"episodes end before a chunk of {args.chunk_size} steps does")
                if due(args.checkpoint_interval):
                    save_checkpoint()
                    break
    except (KeyboardInterrupt, RunError, OSError) as error:
        interruption = error
        summary["stopped"] = str(error) or type(error).__name__
    step = progress["env_steps"]
    summary |= {"env_steps": step, "wall_time_s": round(time.time() - log.start_time, 1)}
    summary["evaluate_again"] = f"python {METHOD}.py --evaluate {log.dir / 'policy.pt'}"
    try:
        if interruption:
            summary["go_on"] = f"python {METHOD}.py --resume {log.dir}"
            save_policy("policy.pt")
            log.write_row(step)
        write_file(log.dir / "summary.json", json.dumps(summary, indent=2).encode())
    except OSError as error:  # the disk may be full
        interruption = interruption or error
    print(f"\n{args.env_id}, seed {args.seed}")
    for name, value in summary.items():
        print(f"  {name:<23}{value}")
    log.lock.close()
    if num_ranks > 1:
        dist.destroy_process_group()
    if isinstance(interruption, KeyboardInterrupt):
        raise interruption
    if interruption:
        raise RunError(f"environment step {step}: {interruption}; what was saved is whole") from interruption
    return summary


if __name__ == "__main__":
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # clusters send it before they take the machine
        arguments = tyro.cli(Args)
        main(resumed_args(arguments) if arguments.resume else arguments)
    except (UserError, RunError) as error:
        print(f"{METHOD}.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        sys.exit(130)
