"""POCO (arXiv 2604.01860): off-policy fine-tuning of a flow policy as posterior inference.

    python poco.py --env-id FetchPickAndPlace-v4    clone demonstrations, then improve online
    python poco.py --resume runs/...                go on after Ctrl-C or a crash, once cloned
    python poco.py --evaluate runs/.../policy.pt    see what came out

The method ends with `train`. The machinery follows, first `Batch`, which the updates take.
Shapes: B batch, O observation, F features, A action, T chunk_size, D = T * A, K flow_steps,
n td_steps, N candidates, M critics, S states with candidates.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import csv
import importlib.util
import io
import itertools
import math
import os
import signal
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

METHOD = "poco"
if importlib.util.find_spec("gymnasium_robotics"):  # may be missing beside robosuite
    with contextlib.redirect_stderr(io.StringIO()):  # hides a notice about three environments
        import gymnasium_robotics
    gym.register_envs(gymnasium_robotics)


@dataclass
class Args:
    # run
    seed: int = 1  # seed of everything random
    torch_threads: int = 1  # CPU threads; more pay for wide networks and images
    bf16: bool = True  # bfloat16 in the updates if the hardware has it; never in cloning
    log_interval: int = 500  # steps between rows of metrics.csv
    resume: Path | None = None  # go on with the run in this folder
    policy: str | None = None  # start from a policy file of either script instead of cloning
    # task and data
    env_id: str = "FetchPickAndPlace-v4"  # Gymnasium id or module:id; actions: a bounded Box
    dataset: str = "demos"  # file.npz, ogbench:name, Minari id, none; demos: the task's in demos/
    num_demos: int | None = None  # at most so many, drawn by --seed (default: 30 of demos/, or all)
    success_at: Literal["end", "any"] = "end"  # which step's success counts: the last, or any
    # networks
    hidden_dim: int = 256  # width of the three hidden layers of policy and critics
    chunk_size: int = 3  # T, actions in one chunk, executed open loop
    flow_steps: int = 5  # K, Euler steps from noise to chunk
    num_critics: int = 2  # M, members of the critic ensemble
    # offline phase
    bc_steps: int | None = None  # steps of cloning (default: 1 an observation, 10 000 to 20 000)
    dropout: float | None = None  # in cloning (default: 0.1 below 3000 observations, then 0)
    batch_size: int = 256  # chunks in a batch, offline and online
    learning_rate: float = 1e-3  # step size of Adam, for cloning, critics and POCO's policy
    critic_warmup: int = 1_000  # updates of the critics alone, after cloning
    # online phase
    total_timesteps: int = 15_000  # online environment steps
    buffer_size: int = 1_000_000  # observations in the replay buffer, demonstrations not counted
    utd_ratio: float = 0.25  # gradient updates per step
    gamma: float | None = None  # discount per step (default: 1 - 2 / time limit, at most 0.98)
    td_steps: int | None = None  # n, TD steps, at least T (default: time limit / 20, at most 10)
    tau: float = 0.05  # Polyak rate of the target critics
    best_of_n: int = 4  # act with the best of n candidates by the target critics, in training
    policy_start: int = 6_000  # steps in which the critics learn alone
    # POCO
    num_candidates: int = 16  # N, chunks per state in the E-step
    posterior_batch_size: int = 32  # S, states of a batch that get an E-step
    effective_samples: float = 0.3  # share of N that the weights keep; smaller is sharper
    temperature: float | None = None  # eta, in units of Q (default: from --effective-samples)
    posterior_coef: float = 1.0  # beta, weight of the posterior term
    clip_threshold: float | None = None  # zeta, of candidates' L_BC (default: batch's 0.9 quantile)
    anchor: Literal["kept", "all"] = "kept"  # M-step clones all but own failures, or all
    # evaluation
    eval_interval: int = 5_000  # steps between evaluations; an episode is cut off there
    eval_episodes: int = 100  # episodes of an evaluation
    eval_best_of_n: int = 1  # evaluate the best of n candidates; 1: the policy without critics
    evaluate: Path | None = None  # evaluate this policy file instead of training
    capture_video: bool = False  # record episodes 0, 1, 8, 27, ... of evaluations as MP4


MAY_BE_ZERO = {"seed", "dropout", "critic_warmup", "utd_ratio", "policy_start", "posterior_coef"}
AT_LEAST_2 = {"batch_size", "num_candidates"}
AT_MOST_1 = {"dropout", "gamma", "tau", "effective_samples"}


# Networks
class Encoder(nn.Module):
    """Features (B, F). Vectors are shifted and scaled by the data's statistics, which travel in the
    state dict. Images pass the convolutions of the first DQN (arXiv 1312.5602), and the features
    are where each channel is active. Args: obs_space, of vectors and images."""
    def __init__(self, obs_space: gym.Space, image_channels: int = 32):
        super().__init__()
        self.layout = Layout(obs_space)
        vector = torch.zeros(self.layout.vector_size, dtype=torch.float64)  # offsets can be large
        self.register_buffer("mean", vector)
        self.register_buffer("std", vector + 1)
        self.convolutions = nn.ModuleList()
        for frames, _, _, colors in self.layout.image_shapes.values():
            layers = nn.Sequential(
                nn.Conv2d(frames * colors, 16, kernel_size=8, stride=4),
                nn.ReLU(),
                nn.Conv2d(16, image_channels, kernel_size=4, stride=2),
                nn.ReLU(),
            )
            self.convolutions.append(layers)
        image_features = 2 * image_channels * len(self.convolutions)
        self.feature_dim = self.layout.vector_size + image_features

    def forward(self, obs: Tensor) -> Tensor:
        vectors, images = self.layout.split(obs)
        vectors = vectors.nan_to_num()  # such an episode is left out, but acted in
        scaled = (vectors - self.mean) / self.std
        features = [scaled.clamp(-10, 10).float()]
        for layers, image in zip(self.convolutions, images):
            pixels = image.movedim(4, 2).flatten(1, 2).float()  # (B, frames * colors, H, W)
            features.append(spatial_softmax(layers(pixels / 255)))
        return torch.cat(features, dim=1)


def spatial_softmax(maps: Tensor) -> Tensor:
    """Expected row and column of each channel's activation (arXiv 1504.00702), for which few
    demonstrations suffice. Args: maps (B, C, H, W). Returns: (B, 2 C), in [-1, 1]."""
    rows = torch.linspace(-1, 1, maps.shape[2])
    columns = torch.linspace(-1, 1, maps.shape[3])
    places = torch.cartesian_prod(rows, columns).to(maps.device)  # (H * W, 2)
    weights = maps.float().flatten(2).softmax(2)  # (B, C, H * W)
    return (weights[..., None] * places).sum(2).flatten(1)


class FlowPolicy(nn.Module):
    """Flow matching over action chunks, along straight lines from noise (t = 0) to chunk (t = 1).
    `encode` turns observations into features (B, F), once per state; the rest works on features."""
    def __init__(self, encode: nn.Module, chunk_dim: int, hidden_dim=256, flow_steps=5, dropout=0):
        super().__init__()
        self.chunk_dim = chunk_dim
        self.flow_steps = flow_steps
        self.encode = encode
        layers = []
        for in_dim in (encode.feature_dim + chunk_dim + 1, hidden_dim, hidden_dim):
            layers += [nn.Linear(in_dim, hidden_dim), nn.SiLU(), nn.Dropout(dropout)]
        self.net = nn.Sequential(*layers, nn.Linear(hidden_dim, chunk_dim))
        self.eval()  # dropout is for cloning alone

    def velocity(self, features: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The flow's velocity v(x, t, s). Args: x (B, D), t (B, 1) in [0, 1]. Returns: (B, D)."""
        return self.net(torch.cat([features, x, t], dim=1))

    def bc_loss(self, features: Tensor, chunk: Tensor, valid: Tensor | None = None) -> Tensor:
        """Flow-matching loss L_BC: squared error of the velocity, averaged over valid entries.
        Args: chunk (B, D) in [-1, 1]; valid (B, T), None: all are. Returns: (B,)."""
        x_0 = torch.randn_like(chunk)
        t = torch.rand_like(chunk[:, :1])
        x_t = (1 - t) * x_0 + t * chunk
        error = (self.velocity(features, x_t, t) - (chunk - x_0)) ** 2  # (B, D)
        if valid is None:
            return error.mean(1)
        action_dim = chunk.shape[1] // valid.shape[1]
        mask = valid.repeat_interleave(action_dim, dim=1)  # (B, D)
        return (error * mask).sum(1) / mask.sum(1)

    def sample(self, features: Tensor, flow_steps: int | None = None) -> Tensor:
        """Euler steps from noise to chunk, K unless flow_steps is given. Returns: (B, D)."""
        num_steps = flow_steps or self.flow_steps
        x = torch.randn(len(features), self.chunk_dim, device=features.device)
        for k in range(num_steps):
            t = torch.full_like(x[:, :1], k / num_steps)
            x = x + self.velocity(features, x, t) / num_steps
        return x.clamp(-1, 1)


class CriticEnsemble(nn.Module):
    """M independent Q(s, chunk), of rewards scaled by the largest of the first. MLPs with
    LayerNorm in the hidden layers; `encode` as in FlowPolicy."""
    def __init__(self, encode: nn.Module, chunk_dim: int, num_critics: int, hidden_dim=256):
        super().__init__()
        self.encode = encode
        self.register_buffer("reward_scale", torch.zeros(()))  # 0 until there is a reward
        self.hidden = nn.ModuleList()
        self.heads = nn.ModuleList()
        for _ in range(num_critics):
            layers = []
            for in_dim in (encode.feature_dim + chunk_dim, hidden_dim, hidden_dim):
                norm = nn.LayerNorm(hidden_dim, elementwise_affine=False)
                layers += [nn.Linear(in_dim, hidden_dim), norm, nn.SiLU()]
            self.hidden.append(nn.Sequential(*layers))
            self.heads.append(nn.Linear(hidden_dim, 1))

    def forward(self, features: Tensor, chunk: Tensor) -> Tensor:
        """Args: features (B, F), chunk (B, D). Returns: Q (M, B)."""
        x = torch.cat([features, chunk], dim=1)
        values = []
        for layers, head in zip(self.hidden, self.heads):
            hidden = layers(x).float()
            with torch.autocast(x.device.type, enabled=False):  # bfloat16 is too coarse for Q
                values.append(head(hidden).squeeze(1))
        return torch.stack(values)


def make_networks(args: Args, obs_space: gym.Space, action_dim: int):
    """Returns: policy and critics. The updates use a policy's encode, bc_loss and sample, in OGPO
    also velocity, flow_steps and chunk_dim, and critics' encode, forward and reward_scale."""
    chunk_dim = args.chunk_size * action_dim
    dropout = args.dropout or 0  # None: train has not set it
    policy = FlowPolicy(Encoder(obs_space), chunk_dim, args.hidden_dim, args.flow_steps, dropout)
    critic = CriticEnsemble(Encoder(obs_space), chunk_dim, args.num_critics, args.hidden_dim)
    return policy, critic


# The method
def td_target(reward: Tensor, next_q: Tensor, terminated: Tensor, discount: Tensor) -> Tensor:
    """n-step target y = sum_i gamma^i r_{t+i} + gamma^n (1 - terminated) Q(s_{t+n}, chunk').
    Args: reward (B,), the discounted sum; next_q (B,), of a chunk' of the policy; terminated (B,),
    0 for a time limit; discount (B,), gamma^n, n up to the episode's end. Returns: (B,)."""
    return reward + discount * (1 - terminated) * next_q


def critic_loss(q: Tensor, target: Tensor, has_target: Tensor) -> Tensor:
    """Squared TD error, 0 for chunks that a time limit or an evaluation cut short.
    Args: q (M, B), target (B,), has_target (B,), 1 or 0. Returns: a scalar."""
    error = (q - target) ** 2 * has_target
    count = has_target.sum().clamp(min=1)
    return error.mean(0).sum() / count


def posterior_weights(q: Tensor, temperature: float | Tensor) -> Tensor:
    """Implicit E-step: w_j = softmax_j(Q_j / eta). Args: q (B, N), eta in units of Q.
    Returns: (B, N)."""
    return torch.softmax(q / temperature, dim=1)


def adaptive_temperature(q: Tensor, effective_samples: float) -> Tensor:
    """Eta in proportion to the spread of each state's Q: for large N and normal Q, 1 / sum_j w_j^2
    is N exp(-(std / eta)^2), here set to effective_samples N. Args: q (B, N). Returns: (B, 1)."""
    spread = q.std(1, keepdim=True).clamp(min=1e-12)
    return spread / math.sqrt(-math.log(effective_samples))


def poco_loss(candidate_losses, weights, bc_losses, posterior_coef, clip_threshold) -> Tensor:
    """Clipped M-step (equation 23): mean_s [beta sum_j w_j min(L_BC(chunk_j, s), zeta)] + mean
    L_BC(chunk, s) of the batch. Args: candidate_losses, weights (S, N); bc_losses (B,).
    Returns: a scalar."""
    clipped = candidate_losses.clamp(max=clip_threshold)
    posterior = (weights * clipped).sum(1).mean()
    return posterior_coef * posterior + bc_losses.mean()


def update_critic(policy, critic, target_critic, optimizer, batch: Batch, args: Args) -> dict:
    """One TD step on chunks, then a Polyak step of the targets. Returns: metrics."""
    device = batch.obs.device
    with torch.no_grad(), mixed_precision(args, device):
        next_chunk = policy.sample(policy.encode(batch.next_obs))
        critic_features = target_critic.encode(batch.next_obs)
        next_q = target_critic(critic_features, next_chunk).mean(0)  # (B,), the critics' mean
        reward = critic.reward_scale * batch.reward
        target = td_target(reward, next_q, batch.terminated, batch.discount)

    with mixed_precision(args, device):
        q = critic(critic.encode(batch.obs), batch.chunk)  # (M, B)
    has_target = torch.maximum(batch.valid[:, -1], batch.terminated)  # T steps long, or terminated
    loss = critic_loss(q, target, has_target)
    grad_norm = gradient_step(optimizer, loss)
    move_towards(target_critic, critic, args.tau)
    return {
        "losses/qf_loss": loss.detach(),
        "losses/qf_values": q.detach().mean(),
        "losses/qf_grad_norm": grad_norm,
    }


def update_policy(policy, target_critic, optimizer, batch: Batch, args: Args) -> dict:
    """E-step on S states of the batch, M-step on their candidates and on the batch without
    own failures. Returns: metrics."""
    device = batch.obs.device
    N = args.num_candidates
    S = args.posterior_batch_size
    with mixed_precision(args, device):
        features = policy.encode(batch.obs)  # (B, F)
    candidate_features = features[:S].repeat_interleave(N, dim=0)  # (S * N, F)

    # E-step: candidates of the current policy, weighed by the target critics. In 2 K steps: K steps
    # spread them less than the exact flow does, so each update would narrow the policy
    with torch.no_grad(), mixed_precision(args, device):
        candidates = policy.sample(candidate_features, flow_steps=2 * args.flow_steps)
        critic_features = target_critic.encode(batch.obs[:S]).repeat_interleave(N, dim=0)
        q = target_critic(critic_features, candidates).mean(0).view(-1, N)  # (S, N)
        temperature = args.temperature or adaptive_temperature(q, args.effective_samples)
        weights = posterior_weights(q, temperature)

    # M-step: regression on the candidates, and on what is kept of the batch as the trust region
    with mixed_precision(args, device):
        candidate_losses = policy.bc_loss(candidate_features, candidates).view(q.shape)
        bc_losses = policy.bc_loss(features, batch.chunk, batch.valid)
    clip_threshold = args.clip_threshold or bc_losses.detach().quantile(0.9)
    if args.anchor == "kept":  # but all, in a batch where every episode failed
        kept = torch.where(batch.kept.any(), batch.kept, 1.0)
        bc_losses = bc_losses * kept / kept.mean()
    loss = poco_loss(candidate_losses, weights, bc_losses, args.posterior_coef, clip_threshold)
    grad_norm = gradient_step(optimizer, loss)
    return {
        "losses/actor_loss": loss.detach(),
        "losses/actor_grad_norm": grad_norm,
        "losses/bc_loss": bc_losses.detach().mean(),
        "losses/effective_samples": (1 / weights.square().sum(1)).mean(),  # of N
        "losses/clip_fraction": (candidate_losses > clip_threshold).float().mean(),
    }


def update_clone(policy, optimizer, batch: Batch) -> dict:
    """One step of behaviour cloning, with the policy's dropout. Returns: metrics."""
    policy.train()
    features = policy.encode(batch.obs)
    loss = policy.bc_loss(features, batch.chunk, batch.valid).mean()
    policy.eval()
    grad_norm = gradient_step(optimizer, loss)
    return {"losses/bc_loss": loss.detach(), "losses/actor_grad_norm": grad_norm}


@torch.no_grad()
def choose_chunk(policy, critic, obs: np.ndarray, best_of_n: int) -> Tensor:
    """Samples n chunks for an observation (O,) and takes the critics' best. Returns: (D,)."""
    device = next(policy.parameters()).device
    obs = torch.as_tensor(obs[None], device=device)
    features = policy.encode(obs).expand(best_of_n, -1)
    chunks = policy.sample(features)  # (n, D)
    critic_features = critic.encode(obs).expand(best_of_n, -1)
    q = critic(critic_features, chunks).mean(0)
    return chunks[q.argmax()]


def train(args: Args, make_networks=make_networks):
    """Clones demonstrations, then improves the policy online: act, store, learn, evaluate.
    Args: make_networks, another one to bring your own policy or critics."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    env = Environment(args, first_seed=0)  # for its spaces
    env.set_chunk(torch.zeros(env.action_dim))  # what fails, fails before the cloning
    env.step()
    env.close()
    gamma = float(np.clip(1 - 2 / env.limit, 0.5, 0.98))  # 0.96 for 50 steps, 0.98 from 100 on
    # Q of the policy's own chunks is too high, and every bootstrap adds that to the target
    td_steps = max(min(env.limit // 20, 10), args.chunk_size)
    args = replace(args, gamma=args.gamma or gamma, td_steps=args.td_steps or td_steps)
    demos = load_demonstrations(args, env)
    num_rows = sum(len(demo.obs) for demo in demos)
    bc_steps = int(np.clip(num_rows, 10_000, 20_000))
    args = replace(args, bc_steps=args.bc_steps or bc_steps)
    if args.dropout is None:  # against overfitting; with more data it costs success
        args = replace(args, dropout=0.1 if num_rows < 3000 else 0.0)
    torch.manual_seed(args.seed)
    if args.policy and not args.resume:
        _, policy, critic = load_policy(args.policy, args, make_networks)
    else:
        policy, critic = make_networks(args, env.obs_space, env.action_dim)
    policy.to(device)
    critic.to(device)
    target_critic = copy.deepcopy(critic)
    actor_optimizer = torch.optim.Adam(policy.parameters(), args.learning_rate, fused=True)
    q_optimizer = torch.optim.Adam(critic.parameters(), args.learning_rate, fused=True)
    buffer = ReplayBuffer(args, env, num_rows + args.buffer_size, device)
    for demo in demos:
        buffer.add(demo._replace(success=1.0))  # all are worth cloning

    networks = {"policy": policy, "critic": critic, "target_critic": target_critic}
    optimizers = {"actor_optimizer": actor_optimizer, "q_optimizer": q_optimizer}
    run = Run(args, networks | optimizers | {"buffer": buffer})
    step = 0

    # offline: clone the demonstrations; then the critics learn the clone's values
    if args.resume:
        step = run.load_checkpoint()
    elif demos:
        if not args.policy:
            fit_statistics(networks, buffer)
            for _ in tqdm(range(args.bc_steps), "cloning"):
                batch = buffer.sample(args.batch_size)
                run.record(update_clone(policy, actor_optimizer, batch))
            if type(critic.encode) is type(policy.encode):  # convolutions that know the task
                for network in (critic, target_critic):
                    network.encode.load_state_dict(policy.encode.state_dict())
        fit_reward_scale(critic, target_critic, buffer)
        for _ in tqdm(range(args.critic_warmup), "critics"):
            batch = buffer.sample(args.batch_size)
            metrics = update_critic(policy, critic, target_critic, q_optimizer, batch, args)
            run.record(metrics)
    if not args.resume:
        run.save(step)
    run.open(step)
    if not run.rows:  # not yet evaluated
        metrics = evaluate(policy, target_critic, args, run.folder, "step 0")
        run.write_row(step, metrics)

    # online: act, store, learn; then evaluate
    run.bar.unpause()  # its rate is that of what follows
    while step < args.total_timesteps:
        # seeds by step: a resumed run then repeats what an uninterrupted one does
        rng = np.random.default_rng([args.seed, step])
        torch.manual_seed(int(rng.integers(2**31)))
        env = Environment(args, first_seed=int(rng.integers(2**31)))
        next_evaluation = (step // args.eval_interval + 1) * args.eval_interval
        stop = min(next_evaluation, args.total_timesteps)
        while step < stop:
            if not env.chunk:
                env.set_chunk(choose_chunk(policy, target_critic, env.obs[-1], args.best_of_n))
            for episode in env.step():  # at most one; the next has begun
                buffer.add(episode)
                run.record_episode(episode)
            step += 1
            run.bar.update()

            if len(buffer) >= args.batch_size:
                if not demos and not q_optimizer.state:  # before the first update
                    fit_statistics(networks, buffer)
                fit_reward_scale(critic, target_critic, buffer)  # once there is a reward
                updates_before = int((step - 1) * args.utd_ratio)
                for _ in range(updates_before, int(step * args.utd_ratio)):
                    batch = buffer.sample(args.batch_size)
                    metrics = update_critic(policy, critic, target_critic, q_optimizer, batch, args)
                    run.record(metrics)
                    if step > args.policy_start:
                        metrics = update_policy(policy, target_critic, actor_optimizer, batch, args)
                        run.record(metrics)
            if step % args.log_interval == 0 and step < stop:
                run.write_row(step, {})

        # the unfinished episode is kept as far as it got; a resumed run also begins a new one
        for episode in env.close():
            buffer.add(episode)
        metrics = evaluate(policy, target_critic, args, run.folder, f"step {step}")
        run.write_row(step, metrics)
        run.save(step)


# Observations
class Layout:
    """How an observation lies in a row: vectors as gymnasium.spaces.flatten puts them; with images,
    bytes, the vectors' float32 first. Args: space, a Box or Dict; images: uint8, (H, W, C)."""
    def __init__(self, space):
        self.space = space
        self.parts = space
        if not isinstance(space, gym.spaces.Dict):
            self.parts = gym.spaces.Dict({"": space})
        self.image_shapes = {}  # (frames, H, W, C) by name
        is_vector = []
        for name, part in self.parts.items():
            size = gym.spaces.flatdim(part)
            if part.dtype == np.uint8 and len(part.shape) > 2:
                shape = (1, *part.shape)[-4:]
                usable = min(shape[1:3]) >= 20 and shape[3] <= 4
                require(usable, f"images are (H, W, C), 20 pixels or more, but not {part.shape}")
                self.image_shapes[name] = shape
            is_vector += [name not in self.image_shapes] * size
        self.is_vector = np.array(is_vector)
        self.vector_size = sum(is_vector)
        self.size = len(is_vector)
        self.dtype = gym.spaces.flatten_space(self.parts).dtype
        if self.image_shapes:
            self.size += 3 * self.vector_size  # float32 has four bytes
            self.dtype = np.dtype(np.uint8)

    def pack(self, obs):
        """Returns: the row (size,)."""
        if not isinstance(obs, dict):
            obs = {"": obs}
        row = gym.spaces.flatten(self.parts, obs)
        require(row.shape == self.is_vector.shape, "the observation is not in its space")
        if not self.image_shapes:
            return row
        vectors = row[self.is_vector].astype(np.float32)
        images = row[~self.is_vector].astype(np.uint8)
        return np.concatenate([vectors.view(np.uint8), images])

    def pack_column(self, columns, key):
        """Returns: rows (n, size) of a file, None if it has none. Vectors alone, or an image alone,
        are the column key; of a Dict with images each part is one, key/name."""
        if not self.image_shapes:
            return columns.get(key)
        keys = [f"{key}/{name}".removesuffix("/") for name in self.parts]
        if not columns.keys() >= set(keys):
            return None
        rows = []
        for parts in zip(*[columns[key] for key in keys]):
            obs = dict(zip(self.parts, parts))
            rows.append(self.pack(obs))
        return np.array(rows)

    def split(self, rows):
        """Args: rows (B, size). Returns: vectors (B, V), and views (B, frames, H, W, C)."""
        if not self.image_shapes:
            return rows, []
        start = 4 * self.vector_size
        vectors = rows[:, :start].contiguous().view(torch.float32)
        images = []
        for shape in self.image_shapes.values():
            stop = start + math.prod(shape)
            image = rows[:, start:stop]
            images.append(image.unflatten(1, shape))
            start = stop
        return vectors, images

    def shift(self, rows):
        """Moves each image by up to 4 pixels, its border repeated (DrQ-v2, arXiv 2107.09645)."""
        _, images = self.split(rows)
        for image in images:
            height, width = image.shape[2:4]
            dy, dx = torch.randint(-4, 5, (2, len(rows), 1, 1))
            y = torch.arange(height)[:, None] + dy  # (B, H, 1)
            x = torch.arange(width) + dx  # (B, 1, W)
            source = y.clamp(0, height - 1) * width + x.clamp(0, width - 1)  # (B, H, W)
            source = source.view(-1, 1, height * width, 1).to(rows.device)
            pixels = image.flatten(2, 3)  # (B, frames, H * W, C)
            pixels.copy_(pixels.gather(2, source.expand_as(pixels)))
        return rows


# Replay buffer
class Trajectory(NamedTuple):
    """One episode of n steps, of an environment or a file."""
    obs: np.ndarray  # (n + 1, O), rows of Layout, the one at the end included
    actions: np.ndarray  # (n, A) in [-1, 1]
    rewards: np.ndarray  # (n,)
    terminated: bool  # False: cut off, by the time limit or an evaluation
    success: float  # 1 or 0, NaN if not reported


class Batch(NamedTuple):
    """Windows of n steps, each within one episode. The first T of them are the chunk."""
    obs: Tensor  # (B, O)
    chunk: Tensor  # (B, D), filled with another window's actions where not valid
    reward: Tensor  # (B,) sum_i gamma^i r_{t+i} over the valid steps
    next_obs: Tensor  # (B, O) after the last valid step
    discount: Tensor  # (B,) gamma to the power of the valid steps
    terminated: Tensor  # (B,) 1 if the last of them terminated
    kept: Tensor  # (B,) 0 if the episode is reported to have failed, else 1
    valid: Tensor  # (B, T) 1 up to the episode's end, of the chunk


class ReplayBuffer:
    """A ring of rows, one for each observation, with the dtype of its layout. The next observation
    is the next row's; the one at an episode's end has a row to itself, where no window starts."""
    def __init__(self, args, env, capacity, device="cpu"):
        self.capacity = capacity
        self.chunk_size = args.chunk_size
        self.td_steps = max(args.td_steps or 1, args.chunk_size)
        self.gamma = args.gamma
        self.widths = [env.action_dim, 1, 1, 1, 1]  # action, reward, terminates, kept, steps left
        self.layout = env.layout
        obs = np.zeros((capacity, env.layout.size), env.layout.dtype)  # no memory until written
        self.obs = torch.from_numpy(obs).to(device)
        self.steps = torch.zeros(capacity, sum(self.widths), device=device)
        self.position = 0
        self.size = 0

    def starts(self):
        """Rows where a window can start."""
        left = self.steps[: self.size, -1]
        return left.nonzero()[:, 0]

    def __len__(self):
        return len(self.starts())

    def add(self, episode):
        """Writes an episode over the oldest rows; if it is longer than the buffer, only its end."""
        left = np.arange(len(episode.rewards), 0, -1)
        ones = np.ones(len(left))
        terminates = ones * episode.terminated
        kept = ones * (episode.success != 0)
        steps = np.column_stack([episode.actions, episode.rewards, terminates, kept, left])
        steps = np.pad(steps, ((0, 1), (0, 0)))  # the row of the last observation

        obs = torch.as_tensor(episode.obs[-self.capacity :])
        steps = torch.as_tensor(steps[-self.capacity :])
        rows = (self.position + torch.arange(len(obs))) % self.capacity
        self.obs[rows] = obs.to(self.obs)
        self.steps[rows] = steps.to(self.steps)
        self.position = (self.position + len(obs)) % self.capacity
        self.size = min(self.size + len(obs), self.capacity)

    def sample(self, batch_size):
        """Windows that start at uniformly drawn steps."""
        device = self.obs.device
        starts = self.starts()
        start = starts[torch.randint(len(starts), (batch_size,), device=device)]
        i = torch.arange(self.td_steps, device=device)
        rows = (start[:, None] + i) % self.capacity
        steps = self.steps[rows]  # (B, n, A + 4)
        actions, rewards, terminates, kept, left = steps.split(self.widths, dim=2)
        left = left[:, 0]  # (B, 1)
        valid = (i < left).float()  # (B, n)
        reward = (rewards[..., 0] * valid * self.gamma**i).sum(1)
        reaches_end = left[:, 0] <= self.td_steps
        terminated = terminates[:, 0, 0] * reaches_end
        num_steps = valid.sum(1)
        discount = self.gamma**num_steps
        after = (start + num_steps.long()) % self.capacity
        obs = self.layout.shift(self.obs[start])
        next_obs = self.layout.shift(self.obs[after])

        filler = actions.roll(1, dims=0)  # of another window: Q must not depend on them
        chunk = torch.where(valid[..., None] > 0, actions, filler)
        chunk = chunk[:, : self.chunk_size].flatten(1)
        valid = valid[:, : self.chunk_size]
        return Batch(obs, chunk, reward, next_obs, discount, terminated, kept[:, 0, 0], valid)

    def state_dict(self):
        return {
            "position": self.position,
            "obs": self.obs[: self.size].clone(),
            "steps": self.steps[: self.size].clone(),
        }

    def load_state_dict(self, state):
        self.position = state["position"]
        self.size = len(state["obs"])
        require(self.size in (self.position, self.capacity), "full buffers cannot grow")
        self.obs[: self.size] = state["obs"]
        self.steps[: self.size] = state["steps"]


def fit_statistics(networks, buffer):
    """Gives every Encoder that has none the buffer's statistics. What is constant, or only jitters
    beside the other entries, is not scaled. Args: networks, by name."""
    vectors, _ = buffer.layout.split(buffer.obs[: buffer.size])
    obs = vectors.double()
    std = obs.std(0, correction=0)
    constant = std <= 1e-12 * obs.abs().amax(0)  # but for rounding
    jitter = std < 1e-4 * std[~constant].median()
    std[constant | jitter] = 1
    for module in nn.ModuleList(networks.values()).modules():
        if isinstance(module, Encoder) and not module.mean.any():  # a policy file brings its own
            module.mean.copy_(obs.mean(0))
            module.std.copy_(std)


def fit_reward_scale(critic, target_critic, buffer):
    """Sets the critics' reward scale by the first rewards there are, and keeps it."""
    if critic.reward_scale == 0:
        largest = buffer.steps[:, -4].abs().max()  # of the rewards
        scale = (1 / largest).nan_to_num(posinf=0.0)
        critic.reward_scale.copy_(scale)
        target_critic.reward_scale.copy_(scale)


# Environment
class Environment:
    """A Gymnasium environment with rows as observations, actions in [-1, 1], its episode so far,
    and what is left of its chunk. Episodes have the seeds first_seed, first_seed + 1, ..."""
    def __init__(self, args, first_seed, videos=None, **options):
        self.name = args.env_id
        self.success_at = args.success_at
        with explained(f"{self.name} cannot be used"):
            env = gym.make(self.name, disable_env_checker=True, **options)
            self.box = env.action_space
            require(isinstance(self.box, gym.spaces.Box), f"actions are no Box, but {self.box}")
            require(self.box.dtype.kind == "f", "actions are no floats")
            self.width = self.box.high - self.box.low
            usable = np.isfinite(self.width) & (self.width > 0)
            require(usable.all(), "an action has no bounds, or low == high")
            self.limit = env.spec.max_episode_steps or 10_000
            env = gym.wrappers.TimeLimit(env, self.limit)
            if videos:
                env = gym.wrappers.RecordVideo(env, videos, disable_logger=True)
            self.layout = Layout(env.observation_space)
        self.env = env
        self.obs_space = self.layout.space
        self.action_dim = math.prod(self.box.shape)
        self.reset(first_seed)

    def reset(self, seed):
        np.random.seed(seed)  # some environments draw from it
        with explained(f"{self.name} failed in reset, which returns observation and info"):
            obs, _ = self.env.reset(seed=seed)
            self.obs = [self.layout.pack(obs)]
        self.seed = seed
        self.steps = []
        self.chunk = []

    def set_chunk(self, chunk):
        """Args: chunk (D,)."""
        self.chunk = list(chunk.cpu().numpy().reshape(-1, self.action_dim))

    def step(self):
        """Takes the chunk's next action. Returns: a list of the episode, if it has just ended."""
        action = self.chunk.pop(0)
        returned = "observation, reward, terminated, truncated and an info with numbers"
        with explained(f"{self.name} failed in step, which returns {returned}"):
            share = (action.reshape(self.box.shape) + 1) / 2
            scaled = self.box.low + share * self.width
            scaled = scaled.clip(self.box.low, self.box.high)  # it may round past them
            obs, reward, terminated, truncated, info = self.env.step(scaled)
            self.obs.append(self.layout.pack(obs))
            success = info.get("is_success", info.get("success", math.nan))
            success = float(np.asarray(success).item())
            reward = float(np.asarray(reward).item())
        self.steps.append((action, reward, success))
        if not (terminated or truncated):
            return []
        ended = self.episode(bool(terminated))
        self.reset(self.seed + 1)
        return ended

    def close(self):
        """Returns: a list of the unfinished episode, cut off."""
        self.env.close()
        return self.episode(terminated=False)

    def episode(self, terminated):
        if not self.steps:
            return []
        actions, rewards, success = map(np.array, zip(*self.steps))
        obs = np.array(self.obs)
        vectors, _ = self.layout.split(torch.from_numpy(obs))
        if vectors.isfinite().all() and np.isfinite(rewards).all():
            success = episode_success(success, self.success_at)
            return [Trajectory(obs, actions, rewards, terminated, success)]
        tqdm.write(f"{self.name}: NaN or infinity in the episode of seed {self.seed}, left out")
        return []


def episode_success(steps, success_at):
    """1 or 0 by an episode's last step, or by any; NaN where it is not reported."""
    if success_at == "any":
        return float(np.fmax.reduce(steps))
    return float(steps[-1])


def mean_success(episodes):
    """NaN where none reports it; some environments report it only where it is 1."""
    successes = [episode.success for episode in episodes]
    if np.isnan(successes).all():
        return math.nan
    return float(np.nan_to_num(successes).mean())


def evaluate(policy, critic, args, folder, title):
    """Runs episodes of the seeds 0, 1, ... Returns: metrics."""
    options = {}
    if args.capture_video:
        options = {"render_mode": "rgb_array", "videos": folder / "videos" / title}
    env = Environment(args, first_seed=0, **options)
    torch.manual_seed(0)
    episodes = []
    while env.seed < args.eval_episodes:
        if not env.chunk:
            env.set_chunk(choose_chunk(policy, critic, env.obs[-1], args.eval_best_of_n))
        episodes += env.step()
    env.close()
    require(episodes, f"{args.env_id}: no episode of the evaluation is usable")

    success = mean_success(episodes)
    mean_return = float(np.mean([episode.rewards.sum() for episode in episodes]))
    result = f"success {success:.2f}, mean return {mean_return:.1f}"
    tqdm.write(f"{title}: {result}, {len(episodes)} episodes")
    return {"eval/success": success, "eval/return": mean_return}


# Demonstrations
def load_demonstrations(args, env):
    """Returns: the dataset's episodes as the networks see them. Raises: UserError."""
    path = args.dataset
    if path == "none":
        return []
    if path == "demos":
        path = f"{Path(__file__).parent}/demos/{args.env_id}.npz"
    read = read_minari
    if path.endswith(".npz"):
        read = read_npz
    elif path.startswith("ogbench:"):
        read = read_ogbench
    episodes = []
    takes = "--dataset takes a file.npz, ogbench:name, a Minari id, demos or none"
    with explained(f"{takes}; {path} cannot be used"):
        usable = Path(path).suffix in ("", ".npz")
        require(usable, "benchmark/README.md converts other files")
        for obs, actions, rewards, *end in read(path, env):
            n = len(rewards)
            where = f"episode {len(episodes)}"
            plausible = n <= env.limit or read is read_ogbench  # play has no limit
            require(plausible, f"{where} exceeds the environment's {env.limit} steps")
            obs = obs.reshape(n + 1, env.layout.size)
            actions = actions.reshape(n, *env.box.shape)
            actions = 2 * (actions - env.box.low) / env.width - 1
            outside = np.abs(actions).max() - 1
            require(outside < 1e-4, f"actions leave their box by {outside / 2:.1%} of its width")
            vectors, _ = env.layout.split(torch.from_numpy(obs))
            finite = vectors.isfinite().all() and np.isfinite(rewards).all()
            require(finite, f"{where} has NaN or infinity")
            actions = actions.reshape(n, -1).clip(-1, 1)
            episodes.append(Trajectory(obs, actions, rewards.reshape(n), *end))
        long = [episode for episode in episodes if len(episode.rewards) >= args.chunk_size]
        require(long, f"no episode lasts a chunk of {args.chunk_size} steps")
    order = np.random.default_rng(args.seed).permutation(len(episodes))
    num_demos = args.num_demos
    if args.dataset == "demos" and num_demos is None:
        num_demos = 30
    demos = [episodes[i] for i in sorted(order[:num_demos])]
    print(f"demonstrations: {len(demos)} of {len(episodes)}, success {mean_success(demos):.2f}")
    return demos


def read_npz(path, env):
    """Episodes of a file of D4RL's columns."""
    with np.load(path, allow_pickle=False) as file:  # objects could run code
        return list(cut(dict(file), env))


def read_ogbench(path, env):
    """Episodes of an OGBench data set with a task in its name. There, terminals are the ends of
    trajectories, and where masks is 0 the task is solved."""
    require(importlib.util.find_spec("ogbench"), "it needs pip install ogbench")
    import ogbench
    _, columns, _ = ogbench.make_env_and_datasets(path.removeprefix("ogbench:"))
    columns["timeouts"] = columns["terminals"]
    columns["terminals"] = columns["masks"] == 0
    return cut(columns, env)


def cut(columns, env):
    """Cuts D4RL's flat columns, a row a step, into Trajectories. Without next_observations the
    row at a time limit only shows where the episode ended."""
    obs = env.layout.pack_column(columns, "observations")
    actions = columns["actions"]
    rewards = columns["rewards"]
    terminals = columns["terminals"].ravel() > 0
    ends = terminals | (columns["timeouts"].ravel() > 0)
    next_obs = env.layout.pack_column(columns, "next_observations")
    unreported = np.full(len(actions), math.nan)
    success = columns.get("success", unreported).ravel()
    require(obs is not None, "there are no observations")
    for column in (actions, rewards, ends, success):
        require(len(column) == len(obs), "columns differ in their numbers of rows")
    require(ends.any(), "terminals and timeouts mark no end")
    ends[-1] = True  # the last episode may be unfinished
    start = 0
    for last in np.flatnonzero(ends):
        rows = slice(start, last + 1)
        last_obs = obs[last]
        if next_obs is not None:
            before = next_obs[start:last]
            after = obs[start + 1 : last + 1]
            torn = ~np.isclose(before, after, equal_nan=True).all(1)
            row = start + np.append(torn, True).argmax()  # the first that is torn, else the last
            require(row == last, f"row {row}: next_observations are not the next row's")
            last_obs = next_obs[last]
        elif not terminals[last]:
            rows = slice(start, last)
        start = last + 1
        if rows.stop > rows.start:
            all_obs = np.concatenate([obs[rows], last_obs[None]])
            succeeded = episode_success(success[rows], env.success_at)
            end = (bool(terminals[last]), succeeded)
            yield Trajectory(all_obs, actions[rows], rewards[rows], *end)


def read_minari(dataset_id, env):
    """Episodes of a Minari dataset as Trajectories."""
    require(importlib.util.find_spec("minari"), 'it needs pip install "minari[hdf5]"')
    import minari
    dataset = minari.load_dataset(dataset_id, download=True)
    layout = Layout(dataset.observation_space)
    for recorded in dataset.iterate_episodes():
        num_obs = len(recorded.rewards) + 1
        every = gym.vector.utils.batch_space(layout.space, num_obs)
        parts = gym.vector.utils.iterate(every, recorded.observations)
        rows = [layout.pack(part) for part in parts]
        infos = recorded.infos or {}
        steps = infos.get("is_success", infos.get("success", [math.nan]))
        succeeded = episode_success(steps, env.success_at)
        end = (bool(recorded.terminations[-1]), succeeded)
        yield Trajectory(np.array(rows), recorded.actions, recorded.rewards, *end)


# Run folder
class Run:
    """A run's record and folder: metrics.csv, policy.pt, and checkpoint.pt for --resume.
    Args: learner, everything with a state dict that a checkpoint holds, by name."""
    def __init__(self, args, learner):
        moment = time.strftime("%Y%m%d-%H%M%S")
        name = f"{args.env_id}__{METHOD}__{args.seed}__{moment}-{os.getpid()}"
        name = name.replace("/", "-").replace(":", "-")
        self.folder = args.resume or Path("runs") / name
        self.args = args
        self.learner = learner
        self.rows = []
        self.recorded = defaultdict(list)  # since the last row
        self.episodes = []
        self.start_time = time.time()

    def open(self, step):
        """Starts the progress bar. At exit, what to type next is printed."""
        resume = f"python {METHOD}.py --resume {self.folder}"
        evaluate = f"python {METHOD}.py --evaluate {self.folder}/policy.pt"
        atexit.register(print, f"{resume}\n{evaluate}")
        self.bar = tqdm(total=self.args.total_timesteps, initial=step, unit="step")

    def record(self, values):
        """Adds to the means of the next row."""
        for name, value in values.items():
            self.recorded[name].append(value)

    def record_episode(self, episode):
        self.record({"charts/episodic_return": episode.rewards.sum()})
        self.episodes.append(episode)
        success = mean_success(self.episodes)
        self.bar.set_postfix(success=f"{success:.2f}", refresh=False)

    def write_row(self, step, means):
        """Adds a row to metrics.csv: means, and those of what was recorded since the last row."""
        for name, values in self.recorded.items():
            means[name] = float(sum(values)) / len(values)
        means["charts/buffer_size"] = len(self.learner["buffer"])
        if self.episodes:
            means["charts/success"] = mean_success(self.episodes)
        row = {"global_step": step, "seconds": round(time.time() - self.start_time, 1)}
        self.rows.append(row | means)
        self.recorded.clear()
        self.episodes.clear()
        with open(self.folder / "metrics.csv", "w") as file:
            names = dict.fromkeys(itertools.chain(*self.rows))
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)

    def save(self, step):
        """Writes the clone, or the policy so far, and the checkpoint."""
        states = {name: part.state_dict() for name, part in self.learner.items()}
        networks = {"policy": states["policy"], "critic": states["target_critic"]}
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file(self.folder / "policy.pt", self.args, networks)
        if step == 0:
            save_file(self.folder / "clone.pt", self.args, networks)
        content = {"method": METHOD, "rows": self.rows, "learner": states, "step": step}
        content["recorded"] = dict(self.recorded)
        content["seconds"] = time.time() - self.start_time
        save_file(self.folder / "checkpoint.pt", self.args, content)

    def load_checkpoint(self):
        """Loads all but optimisers' settings, which may change. Returns: the step."""
        _, content = read_file(self.folder / "checkpoint.pt")
        method = content["method"]
        require(method == METHOD, f"resume this run with python {method}.py --resume {self.folder}")
        with explained(f"{self.folder} does not fit these arguments"):
            for name, state in content["learner"].items():
                part = self.learner[name]
                if "optimizer" in name:
                    state["param_groups"] = part.state_dict()["param_groups"]
                part.load_state_dict(state)
        self.rows = content["rows"]
        self.recorded.update(content["recorded"])
        self.start_time -= content["seconds"]
        return content["step"]


def save_file(path, args, content):
    """Writes content and arguments; an older file stays until the new one is whole."""
    saved = asdict(replace(args, resume=None, evaluate=None))
    data = io.BytesIO()
    torch.save({"args": saved} | content, data)
    unfinished = path.with_suffix(".tmp")
    with open(unfinished, "wb") as file:
        file.write(data.getbuffer())
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def read_file(path):
    """Returns: arguments, content. Raises: UserError."""
    with explained(f"{path} is not there, damaged, or not written by these scripts"):
        content = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        args = Args()
        for name, value in content["args"].items():
            known = hasattr(args, name)  # the other script's own mean nothing here
            if known and value is not None:  # None leaves today's default
                setattr(args, name, value)
        return args, content


def load_policy(path, args=None, make_networks=make_networks):
    """Returns: arguments, those given or the file's own, policy and critic. Raises: UserError."""
    saved, content = read_file(path)
    args = args or saved
    require("policy" in content, f"{path} is no policy: take policy.pt or clone.pt")
    env = Environment(args, first_seed=0)
    env.close()
    policy, critic = make_networks(args, env.obs_space, env.action_dim)
    with explained(f"{path} does not fit these arguments"):
        policy.load_state_dict(content["policy"])
        critic.load_state_dict(content["critic"])
    return args, policy, critic


# Precision and optimisers
def mixed_precision(args, device):
    """bfloat16 for matrix products, where the hardware has it."""
    features = torch.cpu.get_capabilities()
    able = features.get("amx_bf16", False) or features.get("avx512_bf16", False)
    if device.type == "cuda":
        able = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16 and able)


def gradient_step(optimizer, loss):
    """A step of any optimiser. Returns: the norm of the gradients. Raises: UserError."""
    optimizer.zero_grad()
    loss.backward()
    parameters = itertools.chain(*[group["params"] for group in optimizer.param_groups])
    norm = nn.utils.clip_grad_norm_(parameters, math.inf)  # measures, but clips nothing
    require(norm.isfinite(), "a loss or its gradient became NaN or infinite")
    optimizer.step()
    return norm


@torch.no_grad()
def move_towards(average, network, rate):
    """A Polyak step of average's parameters."""
    for old, new in zip(average.parameters(), network.parameters()):
        old.lerp_(new, rate)


# Command line
class UserError(Exception):
    """What is wrong and what was expected, in a sentence."""


def require(condition, sentence):
    if not condition:
        raise UserError(sentence)


@contextlib.contextmanager
def explained(what):
    """Turns what foreign code or files raise into a UserError."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}, "
        hint = ""
        if "OpenGL" in str(error):
            hint = ". Without a screen, set MUJOCO_GL=egl (Debian: apt install libegl1)"
        raise UserError(f"{what}: {kind}{error}{hint}") from error


def check(args):
    """Raises: UserError for arguments no run can work with."""
    for name, value in vars(args).items():
        if type(value) in (int, float):
            least = 2 if name in AT_LEAST_2 else 1e-9
            least = 0 if name in MAY_BE_ZERO else least
            most = 1 if name in AT_MOST_1 else 2**31 - 1
            option = name.replace("_", "-")
            require(least <= value <= most, f"--{option} {value} is not in {least} to {most}.")
    require(args.batch_size <= args.buffer_size, "--batch-size must not be above --buffer-size.")
    if args.capture_video:
        require(importlib.util.find_spec("moviepy"), "--capture-video needs pip install moviepy.")


def main(make_networks=make_networks):
    """Evaluates or trains. What a user got wrong is reported in one sentence."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clusters send it
    try:
        args = tyro.cli(Args)
        file = args.evaluate or args.policy
        if args.resume:
            file = args.resume / "checkpoint.pt"
        if file:  # its arguments are the defaults, typed ones win
            saved, _ = read_file(file)
            args = tyro.cli(Args, default=saved)
        if args.resume:
            for name in ("env_id", "dataset", "num_demos", "policy", "seed"):
                before = getattr(saved, name)
                require(getattr(args, name) == before, f"--resume: {name} must stay {before}.")
        check(args)
        torch.set_num_threads(args.torch_threads)
        if not args.evaluate:
            return train(args, make_networks)
        _, policy, critic = load_policy(args.evaluate, args, make_networks)
        evaluate(policy, critic, args, args.evaluate.parent, args.evaluate.stem)
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, MemoryError) as error:
        tqdm.write(f"{METHOD}.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
