"""OGPO (arXiv 2605.03065): off-policy PPO on the whole denoising chain of a flow policy over action chunks.

    python ogpo.py --env-id FetchPickAndPlace-v4    clone scripted demonstrations, then improve online
    python ogpo.py --resume runs/...                go on after Ctrl-C or a crash
    python ogpo.py --evaluate runs/.../policy.pt    see what came out

The method ends with `train`, the machinery follows. Shapes: B batch, O observation, A action, T chunk_size,
D = T * A, K flow_steps, G chains, M critics, E environments.
"""

import atexit
import contextlib
import copy
import importlib.util
import io
import itertools
import math
import os
import signal
import sys
import time
import zipfile
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import partial
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

METHOD = "ogpo"
LEAST = {"seed": 0, "demo_noise": 0, "critic_warmup": 0, "utd_ratio": 0,
         "success_coef": 0, "chi2_coef": 0, "group_size": 2}
MOST = {"gamma": 1, "tau": 1, "hidden_dim": 2**14, "policy_tau": 1, "chi2_tau": 1}
RANK, NUM_RANKS = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun
CPU_BF16 = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
progress = partial(tqdm, leave=False, disable=RANK > 0)
gym.register_envs(gymnasium_robotics)


@dataclass
class Args:
    # run
    seed: int = 1  # seed of everything random
    torch_threads: int | None = None  # CPU threads (default: torch's choice)
    bf16: bool = True  # bfloat16, where the hardware has it
    compile: bool = False  # torch.compile the updates
    tensorboard: bool = False  # log to TensorBoard too
    track: bool = False  # log to Weights & Biases too
    log_interval: int = 500  # steps between rows of metrics.csv
    resume: Path | None = None  # go on with the run in this folder
    policy: str | None = None  # start from a policy file of either script instead of cloning
    # task and data
    env_id: str = "FetchPickAndPlace-v4"  # Gymnasium id or module:id; actions: a bounded Box
    dataset: str = "scripted"  # scripted, none, file.npz or a Minari id
    save_dataset: Path | None = None  # write the demonstrations to this .npz file
    num_demos: int = 200  # scripted demonstration episodes
    demo_noise: float = 0.4  # standard deviation of the noise on their actions
    success_at: Literal["end", "any"] = "end"  # an episode succeeds by its last step, or by any
    # networks
    hidden_dim: int = 256  # width of the three hidden layers of policy and critics
    chunk_size: int = 3  # T, actions in one chunk, executed open loop
    flow_steps: int = 5  # K, Euler steps from noise to chunk
    num_critics: int = 2  # M, members of the critic ensemble
    # offline phase
    bc_steps: int = 10_000  # gradient steps of behaviour cloning
    batch_size: int = 256  # chunks in a batch, offline and online
    learning_rate: float = 1e-3  # step size of Adam, for policy and critics
    critic_warmup: int = 3_000  # updates of the critics before the policy's first
    # online phase
    total_timesteps: int = 20_000  # online environment steps
    num_envs: int = 4  # environments stepped side by side
    buffer_size: int = 1_000_000  # steps in the replay buffer
    utd_ratio: float = 0.5  # gradient updates per step
    gamma: float = 0.96  # discount per step
    tau: float = 0.05  # Polyak rate of the target critics
    q_aggregation: Literal["mean", "min"] = "mean"  # how the critics' values become one
    best_of_n: int = 1  # act with the best of n candidates by the target critics
    # OGPO
    group_size: int = 8  # G, chains per state
    ppo_batch_size: int = 32  # states of the batch that get a group of chains
    sigma: float = 1.0  # noise of the stochastic sampler
    clip_epsilon: float = 0.005  # clip of the chains' probability ratio, 1 +- epsilon
    ppo_learning_rate: float = 2e-4  # step size of Adam for the policy online
    policy_tau: float = 0.1  # Polyak rate of the old policy, from which the chains come
    conservative: bool = True  # OGPO+CA: count an advantage only where all critics agree on its sign
    success_coef: float = 1.0  # OGPO+: weight of L_BC on the successes online; 0: off
    chi2_coef: float = 0.0  # weight of the penalty for leaving the slow policy; 0: off
    chi2_sharpness: float = 5.0  # how fast pessimism sets in as the ratio passes 1
    chi2_tau: float = 5e-4  # Polyak rate of the slow policy
    next_samples: int = 1  # chunks per next state in the TD target
    next_reduction: Literal["mean", "median"] = "mean"  # how their values become one
    # evaluation
    eval_interval: int = 2_500  # steps between evaluations, with checkpoints
    eval_episodes: int = 100  # episodes of an evaluation
    evaluate: Path | None = None  # evaluate this policy file instead of training
    render: bool = False  # show evaluations in a window
    capture_video: bool = False  # record evaluations as MP4


# Networks
class Normalizer(nn.Module):
    """Shifts and scales observations. Its statistics, with that of rewards, travel in the state dict."""
    def __init__(self, obs_dim):
        super().__init__()
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))
        self.register_buffer("reward_scale", torch.ones(()))

    def fit(self, buffer):
        """Takes a buffer's statistics on all ranks. Constants are only shifted; the largest |reward| is 1."""
        obs, _, _, rewards, _, _ = buffer.steps[: buffer.size].double().split(buffer.widths, dim=1)
        moments = [obs.mean(0), obs.square().mean(0), rewards.abs().max()]
        mean, square, largest = average_over_ranks(moments)
        std = (square - mean**2).clamp(min=0).sqrt()
        self.mean, self.std = mean.float(), torch.where(std < 1e-4, 1.0, std).float()
        self.reward_scale = torch.where(largest > 0, 1 / largest, 1.0).float()

    def forward(self, obs):
        return ((obs - self.mean) / self.std).clamp(-10, 10)


class FlowPolicy(nn.Module):
    """Flow matching over action chunks along straight lines from noise (t = 0) to chunk (t = 1)."""
    def __init__(self, obs_dim, chunk_dim, hidden_dim=256, flow_steps=5):
        super().__init__()
        self.chunk_dim, self.flow_steps, self.normalize = chunk_dim, flow_steps, Normalizer(obs_dim)
        layers = []
        for i, o in itertools.pairwise([obs_dim + chunk_dim + 1] + [hidden_dim] * 3):
            layers += [nn.Linear(i, o), nn.SiLU()]
        self.net = nn.Sequential(*layers, nn.Linear(hidden_dim, chunk_dim))

    def velocity(self, obs, x, t):
        """The flow's velocity v(x, t, s). Args: obs (B, O), x (B, D), t (B, 1) in [0, 1]. Returns: (B, D)."""
        return in_blocks(self.net, torch.cat([self.normalize(obs), x, t], dim=1))

    def bc_loss(self, obs, chunk, valid=None, noise=None, time=None):
        """Flow-matching loss L_BC: squared error of the velocity, averaged over each chunk's valid entries.
        Args: obs (B, O); chunk (B, D) in [-1, 1]; valid (B, T); noise (B, D); time (B, 1). Returns: (B,)."""
        x_0 = torch.randn_like(chunk) if noise is None else noise
        t = torch.rand_like(chunk[:, :1]) if time is None else time
        x_t = (1 - t) * x_0 + t * chunk
        error = (self.velocity(obs, x_t, t) - (chunk - x_0)) ** 2  # (B, D)
        valid = torch.ones_like(t) if valid is None else valid
        mask = valid.repeat_interleave(chunk.shape[1] // valid.shape[1], dim=1)  # (B, D)
        return (error * mask).sum(1) / mask.sum(1)

    def sample(self, obs, noise=None, flow_steps=None):
        """K Euler steps from noise x_0 (B, D). Args: obs (B, O). Returns: chunks (B, D) in [-1, 1]."""
        x = torch.randn(len(obs), self.chunk_dim, device=obs.device) if noise is None else noise
        num_steps = flow_steps or self.flow_steps
        for k in range(num_steps):
            x = x + self.velocity(obs, x, torch.full_like(x[:, :1], k / num_steps)) / num_steps
        return x.clamp(-1, 1)


class EnsembleLinear(nn.Module):
    """M linear layers in one batched product, initialised as nn.Linear is."""
    def __init__(self, num_critics, in_dim, out_dim):
        super().__init__()
        bound = in_dim**-0.5
        weight, bias = (torch.empty(num_critics, n, out_dim).uniform_(-bound, bound) for n in (in_dim, 1))
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)  # (M, B, in) -> (M, B, out)


class CriticEnsemble(nn.Module):
    """M independent chunk values Q(s, chunk), MLPs with LayerNorm in the hidden layers."""
    def __init__(self, obs_dim, chunk_dim, num_critics, hidden_dim=256):
        super().__init__()
        self.num_critics, self.normalize = num_critics, Normalizer(obs_dim)
        layers, norm = [], nn.LayerNorm(hidden_dim, elementwise_affine=False)  # no weights
        for i, o in itertools.pairwise([obs_dim + chunk_dim] + [hidden_dim] * 3):
            layers += [EnsembleLinear(num_critics, i, o), norm, nn.SiLU()]
        self.net, self.head = nn.Sequential(*layers), EnsembleLinear(num_critics, hidden_dim, 1)

    def forward(self, obs, chunk):
        """Args: obs (B, O), chunk (B, D). Returns: Q (M, B)."""
        x = torch.cat([self.normalize(obs), chunk], dim=1)
        return in_blocks(self.value, x.expand(self.num_critics, -1, -1)).squeeze(2)

    def value(self, x):  # (M, B, O + D) -> (M, B, 1)
        hidden = self.net(x)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 cannot tell -20.0 from -20.06
            return self.head(hidden.float())


# The method
def aggregate(q, how):
    """One value from the ensemble's. Args: q (M, ...); how, "mean" or "min". Returns: (...)."""
    return q.mean(0) if how == "mean" else q.amin(0)


def td_target(reward, next_q, terminated, gamma, chunk_size):
    """T-step target y = sum_i gamma^i r_{t+i} + gamma^T (1 - terminated) Q(s_{t+T}, chunk' of the policy).
    Args: reward (B,), the discounted sum; next_q (B,); terminated (B,), 0 for a time limit. Returns: (B,)."""
    return reward + gamma**chunk_size * (1 - terminated) * next_q


def critic_loss(q, target, known):
    """Squared TD error where the target is known: not in a window that a time limit cut short.
    Args: q (M, B), target (B,), known (B,), 1 or 0. Returns: a scalar."""
    return ((q - target) ** 2 * known).sum() / (len(q) * known.sum().clamp(min=1))


def reduce_next_q(next_q, how):
    """Q-variance reduction: one value from those of n next chunks. Args: next_q (B, n). Returns: (B,)."""
    return next_q.mean(1) if how == "mean" else next_q.quantile(0.5, dim=1)


def chain_step(policy, obs, x, t, sigma):
    """One stochastic Euler step of the flow, a Normal of x_{k+1}. The drift's term (sigma_t^2 / 2) score,
    sigma_t = sigma sqrt(1 - t), score = (t v - x) / (1 - t), keeps the marginals of the ODE for every sigma.
    Args: obs (B, O); x (B, D); t (B, 1) in [0, 1). Returns: of (B, D)."""
    dt = 1 / policy.flow_steps
    v = policy.velocity(obs, x, t)
    mean = x + dt * (v + sigma**2 / 2 * (t * v - x))  # 1 - t cancels
    return torch.distributions.Normal(mean, sigma * torch.sqrt((1 - t) * dt), validate_args=False)


@torch.no_grad()
def sample_chain(policy, obs, sigma, noise=None):
    """Draws the denoising chain x_0, ..., x_K of the stochastic sampler; sigma 0 gives the ODE's.
    Args: obs (B, O); noise x_0 (B, D). Returns: chain (K + 1, B, D), its chain_log_prob (B,)."""
    x_0 = torch.randn(len(obs), policy.chunk_dim, device=obs.device) if noise is None else noise
    chain, log_probs = [x_0], []
    for k in range(policy.flow_steps):
        step = chain_step(policy, obs, chain[-1], torch.full_like(x_0[:, :1], k / policy.flow_steps), sigma)
        chain.append(step.mean + step.stddev * torch.randn_like(step.mean))  # step.sample() would wait
        log_probs.append(step.log_prob(chain[-1]).mean(1))
    return torch.stack(chain), torch.stack(log_probs).mean(0)


def chain_log_prob(policy, obs, chain, sigma):
    """Log density of the chain's steps given x_0, averaged over the K steps and D numbers.
    Args: obs (B, O); chain (K + 1, B, D); sigma > 0. Returns: (B,)."""
    steps, n, dim = len(chain) - 1, *chain.shape[1:]
    t = torch.arange(steps, device=chain.device).repeat_interleave(n)[:, None].to(chain) / steps  # (K * B, 1)
    step = chain_step(policy, obs.repeat(steps, 1), chain[:-1].reshape(-1, dim), t, sigma)
    return step.log_prob(chain[1:].reshape(-1, dim)).mean(1).view(steps, n).mean(0)


def group_advantage(q, conservative):
    """Advantage over the group's mean, A_m,j = Q_m,j - mean_j Q_m,j. Plain: the critics' mean. Conservative
    (OGPO+CA): the value nearest to zero where all critics agree on the sign, zero where they do not.
    Args: q (M, B, G). Returns: (B, G)."""
    advantage = q - q.mean(2, keepdim=True)
    if conservative:
        return advantage.amin(0).clamp(min=0) + advantage.amax(0).clamp(max=0)  # at most one is not zero
    return advantage.mean(0)


def chi2_penalised_q(q, ratio, coef, sharpness):
    """Value of chains that leave the slow policy: (1 - w) mean_m Q + w min_m Q - b ratio, b = coef * std_m Q,
    w = sigmoid(a (ratio - 1)). Args: q (M, B, G); ratio (B, G), new over slow policy; sharpness a. (B, G)."""
    weight = torch.sigmoid(sharpness * (ratio - 1))
    return (1 - weight) * q.mean(0) + weight * q.amin(0) - coef * q.std(0, correction=0) * ratio


def ppo_loss(log_prob, old_log_prob, advantage, clip_epsilon):
    """Clipped surrogate -mean min(ratio A, clip(ratio, 1 - eps, 1 + eps) A) for A and ratio = exp(log_prob -
    old_log_prob). Args: all three (...,). Returns: a scalar, metrics."""
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon)
    loss = -torch.minimum(ratio * advantage, clipped * advantage).mean()
    outside = (ratio.detach() - 1).abs() > clip_epsilon
    return loss, {"losses/clip_fraction": outside.float().mean(), "losses/ratio_std": ratio.detach().std()}


def gradient_step(optimizer, loss):
    """A step of fused Adam; a gradient that is not finite changes no weight. Returns: its norm."""
    optimizer.zero_grad()
    loss.backward()
    gradients = average_over_ranks([parameter.grad for parameter in optimizer.param_groups[0]["params"]])
    norm = nn.utils.get_total_norm(gradients)
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # read by the kernel
    optimizer.step()
    return norm


def update_critic(policy, critic, target_critic, optimizer, batch, args):
    """One TD step on chunks, then a Polyak step of the targets. Returns: metrics."""
    with torch.no_grad(), mixed_precision(args, batch.obs.device):
        next_obs = batch.next_obs.repeat_interleave(args.next_samples, dim=0)
        next_q = aggregate(target_critic(next_obs, policy.sample(next_obs)), args.q_aggregation)
        next_q = reduce_next_q(next_q.view(-1, args.next_samples), args.next_reduction)
        reward = critic.normalize.reward_scale * batch.reward
        target = td_target(reward, next_q, batch.terminated, args.gamma, args.chunk_size)
    with mixed_precision(args, batch.obs.device):
        q = critic(batch.obs, batch.chunk)  # (M, B)
    loss = critic_loss(q, target, torch.maximum(batch.valid[:, -1], batch.terminated))
    norm, values = gradient_step(optimizer, loss), q.detach().mean()
    with torch.no_grad():
        torch._foreach_lerp_(list(target_critic.parameters()), list(critic.parameters()), args.tau)
    return {"losses/qf_loss": loss.detach(), "losses/qf_values": values, "losses/qf_grad_norm": norm}


def update_policy(policy, old_policy, slow_policy, target_critic, optimizer, batch, success, args):
    """Draws groups of chains from the old policy; PPO on their values, clones successes. Returns: metrics."""
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
                penalised = chi2_penalised_q(q, ratio, args.chi2_coef, args.chi2_sharpness)
                q = q + penalised - q.mean(0)  # members stay apart
        spread = q.mean(0).std(1, correction=0).mean()  # the rewards' scale drops out
        advantage = group_advantage(q, args.conservative) / spread.clamp(min=1e-12)
        loss, metrics = ppo_loss(log_prob, old_log_prob, advantage.flatten(), args.clip_epsilon)
        if args.success_coef and success:
            bc_loss = policy.bc_loss(success.obs, success.chunk, success.valid).mean()
            loss, metrics["losses/bc_loss"] = loss + args.success_coef * bc_loss, bc_loss.detach()
    metrics["losses/actor_grad_norm"] = gradient_step(optimizer, loss)
    with torch.no_grad():
        for network, tau in ((old_policy, args.policy_tau), (slow_policy, args.chi2_tau)):
            torch._foreach_lerp_(list(network.parameters()), list(policy.parameters()), tau)
    return metrics | {
        "losses/actor_loss": loss.detach(),
        "losses/zero_advantages": (advantage == 0).float().mean(),
        "losses/group_q_std": spread,
    }


@torch.no_grad()
def choose_chunks(policy, critic, best_of_n, obs):
    """Samples n chunks for each observation (E, O) and takes the best by the critics. Returns: (E, D)."""
    obs = torch.as_tensor(obs.repeat(best_of_n, 0), dtype=torch.float32, device=policy.normalize.mean.device)
    chunks = policy.sample(obs)
    best = critic(obs, chunks).mean(0).view(-1, best_of_n).argmax(1, keepdim=True)  # (E, 1)
    return chunks.view(len(best), best_of_n, -1).take_along_dim(best[..., None], dim=1)[:, 0].cpu().numpy()


def train(args):
    """Clones demonstrations, then improves the policy online: act, learn, evaluate, save."""
    device = start_process()
    policy, critic, new_buffer = make_networks(args, device)
    old_policy, slow_policy = copy.deepcopy(policy), copy.deepcopy(policy)
    target_critic, buffer, success_buffer = copy.deepcopy(critic), new_buffer(), new_buffer()  # no experts
    policy_optimizer = torch.optim.Adam(policy.parameters(), args.ppo_learning_rate, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), args.learning_rate, fused=True)
    networks = {"policy": policy, "critic": critic, "target_critic": target_critic}
    networks |= {"old_policy": old_policy, "slow_policy": slow_policy}
    optimizers = {"policy_optimizer": policy_optimizer, "critic_optimizer": critic_optimizer}
    buffers = {"buffer": buffer, "success_buffer": success_buffer}
    run = Run(args, networks | optimizers | buffers)  # with --resume, as the checkpoint has them
    demos = [] if run.rows else load_demonstrations(args)
    if args.policy and not run.rows:
        load_networks(args.policy, networks)
    run.start()
    compiled = partial(torch.compile, mode="reduce-overhead", disable=not args.compile)
    critic_step, policy_step = compiled(update_critic), compiled(update_policy)

    # offline: clone the demonstrations; then the critics learn the clone's values
    if not run.rows:
        demo_buffer = new_buffer()
        clone_optimizer = torch.optim.Adam(policy.parameters(), args.learning_rate, fused=True)
        for episode in demos:
            demo_buffer.add_episode(episode)
        for network in networks.values() if demos and not args.policy else ():
            network.normalize.fit(demo_buffer)
        for _ in progress(range(args.bc_steps if demos and not args.policy else 0), "cloning"):
            batch = demo_buffer.sample(args.batch_size)
            loss = policy.bc_loss(batch.obs, batch.chunk, batch.valid).mean()
            grad_norm = gradient_step(clone_optimizer, loss)
            run.record({"losses/bc_loss": loss.detach(), "losses/actor_grad_norm": grad_norm})
        for network in (old_policy, slow_policy):
            network.load_state_dict(policy.state_dict())
        for _ in progress(range(args.critic_warmup if demos else 0), "critics"):
            batch = demo_buffer.sample(args.batch_size)
            run.record(critic_step(policy, critic, target_critic, critic_optimizer, batch, args))
        run.evaluate_and_save()

    # online: act, learn the values, improve the policy
    episodes = start_rollout(policy, target_critic, args, run)
    while run.step < args.total_timesteps:
        for episode in next(episodes):
            buffer.add_episode(episode)
            if episode.success == 1:
                success_buffer.add_episode(episode)
            run.record({"charts/success": episode.success, "charts/episodic_return": episode.rewards.sum()})
            run.record({"charts/episodic_length": len(episode.rewards)})
        updates = run.advance()
        if updates and args.dataset == "none" and not (args.policy or critic_optimizer.state):  # at first
            for network in networks.values():
                network.normalize.fit(buffer)
        for _ in range(updates):
            batch = buffer.sample(args.batch_size)
            run.record(critic_step(policy, critic, target_critic, critic_optimizer, batch, args))
            if run.step * args.utd_ratio > args.critic_warmup:
                ready = success_buffer.size >= args.batch_size
                success = success_buffer.sample(args.batch_size) if ready else None
                policies = policy, old_policy, slow_policy
                run.record(policy_step(*policies, target_critic, policy_optimizer, batch, success, args))
        if run.is_due(args.eval_interval):
            run.evaluate_and_save()
            episodes = start_rollout(policy, target_critic, args, run)
        elif run.is_due(args.log_interval):
            run.write_row()


# Replay buffer
class Trajectory(NamedTuple):
    """One episode of n steps, of an environment or a file."""
    obs: np.ndarray  # (n + 1, O), with that at the end
    actions: np.ndarray  # (n, A) in [-1, 1]
    rewards: np.ndarray  # (n,)
    terminated: bool  # False: cut off by the time limit
    success: float  # 1 or 0, NaN if not reported
    seed: int = 0  # of the reset that began it


class Batch(NamedTuple):
    """Windows of T steps, each within one episode."""
    obs: Tensor  # (B, O)
    chunk: Tensor  # (B, D), another window's where not valid
    reward: Tensor  # (B,) sum_i gamma^i r_{t+i} over the valid steps
    next_obs: Tensor  # (B, O) after the last valid step
    terminated: Tensor  # (B,) 1 if that step terminated
    valid: Tensor  # (B, T) 1 up to the episode's end


class ReplayBuffer:
    """A ring of environment steps. Each knows how many its episode has left: no window leaves an episode."""
    def __init__(self, capacity, obs_dim, action_dim, chunk_size, gamma, device="cpu"):
        self.capacity, self.chunk_size, self.gamma = capacity, chunk_size, gamma
        self.widths = [obs_dim, obs_dim, action_dim, 1, 1, 1]  # ..., reward, terminated, steps left
        self.steps = torch.from_numpy(np.zeros((capacity, sum(self.widths)), np.float32)).to(device)  # lazy
        self.position = self.size = 0

    def add_episode(self, episode):
        """Writes an episode, of a long one the end, over the oldest steps. Raises: UserError."""
        obs, actions, rewards = episode[:3]
        left = np.arange(len(actions), 0, -1)  # steps, this one included
        rows = np.column_stack([obs[:-1], obs[1:], actions, rewards, (left == 1) * episode.terminated, left])
        require(np.isfinite(rows).all(), "an observation, action or reward is NaN or infinite")
        rows = torch.as_tensor(rows[-self.capacity :], dtype=torch.float32, device=self.steps.device)
        self.position = (self.position + len(left)) % self.capacity
        self.steps[(self.position - torch.arange(len(rows), 0, -1)) % self.capacity] = rows
        self.size = min(self.size + len(rows), self.capacity)

    def sample(self, batch_size):
        """Windows with uniform first steps."""
        start = torch.randint(self.size, (batch_size,), device=self.steps.device)
        i = torch.arange(self.chunk_size, device=start.device)
        steps = self.steps[(start[:, None] + i) % self.capacity]  # (B, T, width)
        obs, next_obs, actions, rewards, terminated, left = steps.split(self.widths, dim=2)
        valid = (i < left[:, 0]).float()  # (B, T)
        last = torch.arange(batch_size, device=start.device), valid.sum(1).long() - 1
        chunk = torch.where(valid[..., None] > 0, actions, actions.roll(1, 0)).flatten(1)
        reward = (rewards[..., 0] * valid * self.gamma**i).sum(1)
        return Batch(obs[:, 0], chunk, reward, next_obs[last], terminated[last][:, 0], valid)

    def state_dict(self):
        return {"at": [self.position, self.size], "steps": self.steps[: self.size].clone()}

    def load_state_dict(self, state):
        self.position, self.size = state["at"]
        require(self.size in (self.position, self.capacity), "full buffers cannot grow")
        self.steps[: self.size] = state["steps"]


# Environments
class Environment:
    """An environment with flat observations (O,), actions (A,) in [-1, 1], and its episode."""
    reporting = set()  # seen to report success: there a missing key means 0

    def __init__(self, args, mode=None, videos=None):
        self.name, self.at_any, self.steps = args.env_id, args.success_at == "any", []
        with explained(f"{self.name} cannot be used"):
            self.env = gym.make(self.name, disable_env_checker=True, **{"render_mode": mode} if mode else {})
            self.space, self.box = self.env.observation_space, self.env.action_space
            bounded = isinstance(self.box, gym.spaces.Box) and self.box.is_bounded()
            require(bounded and self.box.dtype.kind == "f", f"actions must be a bounded Box, not {self.box}")
            self.obs_dim, self.action_dim = gym.spaces.flatdim(self.space), math.prod(self.box.shape)
            self.limit = self.env.spec.max_episode_steps or 10_000
            require(args.chunk_size <= self.limit, f"--chunk-size is above its {self.limit} steps")
        if videos:
            self.env = gym.wrappers.RecordVideo(self.env, str(videos), disable_logger=True)

    def to_own_range(self, action):
        low, high = self.box.low, self.box.high  # rounding may leave them
        return np.clip(low + (action.reshape(low.shape) + 1) / 2 * (high - low), low, high).astype(low.dtype)

    def reset(self, seed):
        self.seed, self.steps, self.chunk, self.success = seed, [], [], math.nan
        with explained(f"{self.name} failed in reset"):
            self.obs = gym.spaces.flatten(self.space, self.env.reset(seed=seed)[0])

    def step(self):
        """Takes the chunk's next action. Returns: the episode, if it has ended."""
        action = self.chunk.pop(0)
        with explained(f"{self.name} failed in step"):
            obs, reward, terminated, truncated, info = self.env.step(self.to_own_range(action))
        self.steps.append((self.obs, action, float(reward)))
        self.obs = gym.spaces.flatten(self.space, obs)
        success = info.get("is_success", info.get("success"))  # Fetch; Adroit, OGBench
        if success is not None:
            self.reporting.add(self.name)
        success = float(success or 0) if self.name in self.reporting else math.nan
        self.success = float(np.fmax(self.success, success)) if self.at_any else success
        if terminated or truncated:
            obs, actions, rewards = zip(*self.steps, strict=True)
            self.steps, data = [], (np.array([*obs, self.obs]), np.array(actions), np.array(rewards))
            return Trajectory(*data, bool(terminated), self.success, self.seed)
        require(len(self.steps) < self.limit, f"{self.name} ends no episode in {self.limit} steps")


def make_networks(args, device="cpu"):
    """Returns: policy and critics, equal on all ranks, and a function that makes replay buffers."""
    env = Environment(args)
    chunk_dim, sizes = args.chunk_size * env.action_dim, (env.obs_dim, env.action_dim, args.chunk_size)
    torch.manual_seed(args.seed)
    policy = FlowPolicy(env.obs_dim, chunk_dim, args.hidden_dim, args.flow_steps).to(device)
    critic = CriticEnsemble(env.obs_dim, chunk_dim, args.num_critics, args.hidden_dim).to(device)
    return policy, critic, partial(ReplayBuffer, args.buffer_size, *sizes, args.gamma, device)


def rollout(envs, act, seeds):
    """Yields the episodes that end in each step of envs; act maps obs (E, O) to open-loop chunks (E, D)."""
    while True:
        for env in [env for env in envs if not env.steps]:
            env.reset(next(seeds))
        fresh = [env for env in envs if not env.chunk]
        if fresh:
            obs = np.stack([env.obs for env in fresh])
            require(np.isfinite(obs).all(), f"{envs[0].name}: an observation is NaN or infinite")
            for env, chunk in zip(fresh, act(obs).astype(np.float32), strict=True):
                env.chunk = list(chunk.reshape(-1, env.action_dim))
        yield [episode for env in envs if (episode := env.step())]


def start_rollout(policy, critic, args, run):
    """Begins environments and noise anew, by seed, rank, progress: none is saved."""
    for_torch, for_episodes = np.random.SeedSequence([args.seed, RANK, len(run.rows)]).generate_state(2)
    torch.manual_seed(int(for_torch))
    envs = [Environment(args) for _ in range(args.num_envs)]
    act = partial(choose_chunks, policy, critic, args.best_of_n)
    return rollout(envs, act, itertools.count(int(for_episodes) // 2))


def collect_episodes(args, act, seeds, *show):
    """One episode a seed: long ones count as often as short ones."""
    envs, episodes = [Environment(args, *show)] + [Environment(args) for _ in seeds[1 : args.num_envs]], {}
    for ended in progress(rollout(envs, act, itertools.count(seeds.start))):
        episodes |= {episode.seed: episode for episode in ended if episode.seed in seeds}
        if len(episodes) == len(seeds):
            envs[0].env.close()
            return [episodes[seed] for seed in seeds]


def evaluate(policy, critic, args, best_of_n, videos):
    """On rank 0, runs single samples, then the best of n, on the seeds 0, 1, ... Returns: what it prints."""
    metrics, show = {}, ("human",) if args.render else ("rgb_array", videos) if args.capture_video else ()
    for n in sorted({1, best_of_n}) if RANK == 0 else ():
        torch.manual_seed(0)  # start_rollout reseeds
        act = partial(choose_chunks, policy, critic, n)
        episodes = collect_episodes(args, act, range(args.eval_episodes), *show)
        success = np.array([episode.success for episode in episodes])
        success = np.nan_to_num(success, nan=0 if args.env_id in Environment.reporting else math.nan)
        rate, mean_return = success.mean(), np.mean([episode.rewards.sum() for episode in episodes])
        result = f"success {rate:.2f} ({success.sum():.0f}/{len(success)}), mean return {mean_return:.1f}"
        tqdm.write(f"{videos.name}, best of {n}: {result}")
        metrics = {"eval/ode_success": rate} | metrics | {"eval/success": rate, "eval/return": mean_return}
    return metrics


# Demonstrations
def load_demonstrations(args):
    """Returns: this rank's demonstrations, failures included. --save-dataset gets all."""
    if args.dataset == "none":
        return []
    with explained(f"--dataset {args.dataset} cannot be used"):
        episodes = run_controller(args) if args.dataset == "scripted" else read_dataset(args)
        require(len(episodes) >= NUM_RANKS, f"{len(episodes)} episodes are too few for {NUM_RANKS} processes")
    print(f"demonstrations: {len(episodes)} episodes, success {np.mean([e.success for e in episodes]):.2f}")
    if args.save_dataset and RANK == 0:
        data, own = io.BytesIO(), Environment(args).to_own_range
        raw = [e._replace(actions=np.array([own(action).ravel() for action in e.actions])) for e in episodes]
        np.savez_compressed(data, **to_columns(raw))
        write_file(args.save_dataset.with_suffix(".npz"), data.getbuffer())
    return episodes[RANK::NUM_RANKS]


def run_controller(args):
    """Episodes of the built-in controller, with Gaussian noise."""
    task, rng = args.env_id.split(":")[-1].split("-")[0], np.random.default_rng(args.seed)
    require(task in SCRIPTED, f"only {', '.join(SCRIPTED)} have controllers; use a file, a Minari id or none")

    def act(obs):
        actions = np.array([SCRIPTED[task](o) for o in obs])
        return np.clip(actions + args.demo_noise * rng.standard_normal(actions.shape), -1, 1)

    first_seed = (2 * args.seed + 1) * 10**6
    return collect_episodes(args, act, range(first_seed, first_seed + args.num_demos))


def go(delta, gripper=-1.0):
    """Action of a proportional step along delta (metres); gripper 1 opens it, -1 closes it."""
    return np.clip([*(15 * delta), gripper], -1, 1)


def fetch_push(obs):
    """Swings over the object until in line behind it, pushes it along that line, rises."""
    to_goal, rel = (obs[3:6] - obs[9:12]) * [1, 1, 0], -obs[12:15]  # from object to goal, to gripper
    distance = np.linalg.norm(to_goal)
    if distance < 0.03:
        return go(np.array([0, 0, 0.25 - rel[2]]))  # out of its way
    line = to_goal / distance
    along = rel @ line
    wrong = max(np.linalg.norm((rel - along * line)[:2]) - 0.01, 0) + max(along + 0.04, 0)  # beside, ahead
    ready = np.clip(1 - wrong / 0.02, 0, 1) * np.clip(1 - rel[2] / 0.03, 0, 1)  # smooth
    target = ready * (0.8 * to_goal + along * line) - (1 - ready) * 0.06 * line
    return go(target - rel + [0, 0, np.clip(3 * wrong, 0, 0.08)])


def fetch_pick_and_place(obs):
    """Hovers over the object, descends, grasps it, carries it to the goal."""
    to_goal, rel, width = obs[3:6] - obs[9:12], obs[12:15], obs[15] + obs[16]  # rel: from gripper to object
    if np.linalg.norm(rel) < 0.04:  # between the fingers: close them, then carry
        return go(to_goal if width < 0.055 else rel, -1)
    hover = np.clip(4 * np.linalg.norm(rel[:2]) - 0.04, 0, 0.08)  # descend only when above it
    return go(rel + [0, 0, hover], 1)


SCRIPTED = {"FetchPush": fetch_push, "FetchPickAndPlace": fetch_pick_and_place}
SCRIPTED["FetchReach"] = lambda obs: go(obs[3:6] - obs[6:9])
COLUMNS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations", "success")


def to_columns(episodes):
    """Episodes as D4RL's flat keys, one row a step."""
    rows = []
    for obs, actions, rewards, terminated, success, _ in episodes:
        last = np.arange(len(rewards)) == len(rewards) - 1
        ends = last & terminated, last & (not terminated)
        rows.append((obs[:-1], actions, rewards, *ends, obs[1:], np.where(last, success, 0.0)))
    return dict(zip(COLUMNS, map(np.concatenate, zip(*rows, strict=True)), strict=True))


def read_dataset(args):
    """Returns: the episodes that last a chunk. Without next_observations, the last row only shows an end."""
    env = Environment(args)
    if args.dataset.endswith(".npz"):
        with np.load(args.dataset, allow_pickle=False) as file:  # objects could run code
            data = {key: np.atleast_1d(file[key]) for key in COLUMNS if key in file}
    else:
        data = to_columns(read_minari(args.dataset, env.env.unwrapped.observation_space))
    require(set(COLUMNS[:5]) <= set(data), f"needed are {', '.join(COLUMNS[:5])}")
    n = len(data["rewards"])
    for key, column in data.items():
        width = env.obs_dim if "observations" in key else env.action_dim if key == "actions" else 1
        fits = column.dtype.kind in "biuf" and len(column) == n and column.size == n * width
        require(fits, f"{key} is {column.dtype} {column.shape}, not {n} rows of {width} numbers")
        require(key == "success" or np.isfinite(column).all(), f"{key} has NaN or infinity")
        data[key] = column.reshape(n, width).astype(np.float64)
    obs, actions, rewards, terminals, timeouts = (data[key] for key in COLUMNS[:5])
    ends = np.flatnonzero(terminals + timeouts)
    require(len(ends), "terminals and timeouts mark no end")
    low, high = env.box.low.flatten(), env.box.high.flatten()
    outside = np.maximum(low - actions, actions - high).max()
    require(outside < 1e-4, f"actions lie outside the action space, by up to {outside:.3g}")
    actions = np.clip((actions - low) / np.where(high > low, high - low, 1) * 2 - 1, -1, 1)
    next_obs, success = data.get("next_observations", obs), data.get("success", np.full((n, 1), math.nan))
    parts, episodes = [rows for rows in np.split(np.arange(n), ends + 1) if len(rows)], []
    for rows in parts:  # the last may be cut off
        last_obs, terminated = next_obs[rows[-1]], bool(terminals[rows[-1]])
        if next_obs is obs and not terminated:
            rows = rows[:-1]
        if len(rows) >= args.chunk_size:
            succeeded = success[rows].max() if args.success_at == "any" else success[rows[-1], 0]
            steps = np.vstack([obs[rows], last_obs]), actions[rows], rewards[rows, 0]
            episodes.append(Trajectory(*steps, terminated, float(succeeded)))
    print(f"{args.dataset}: {len(episodes)} of {len(parts)} episodes last a chunk")
    return episodes


def read_minari(dataset, space):
    require(importlib.util.find_spec("minari"), 'for a Minari id: pip install "minari[hdf5]"')
    import minari
    episodes = []
    for episode in minari.load_dataset(dataset, download=True).iterate_episodes():
        infos, batch = episode.infos or {}, gym.vector.utils.batch_space(space, len(episode.rewards) + 1)
        obs = [gym.spaces.flatten(space, o) for o in gym.vector.utils.iterate(batch, episode.observations)]
        ends = bool(episode.terminations[-1]), float(infos.get("success", [math.nan])[-1])
        episodes.append(Trajectory(np.array(obs), episode.actions, episode.rewards, *ends))
    return episodes


# Run folder
class Run:
    """A run's progress and folder: metrics.csv, policy.pt and checkpoint.pt, which has all."""
    def __init__(self, args, learner):
        """With --resume, loads the checkpoint into learner, parts with a state dict."""
        name = f"{args.env_id}__{METHOD}__{args.seed}__{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        self.folder = args.resume or Path("runs") / name.replace("/", "-").replace(":", "-")
        launcher = "python" if NUM_RANKS == 1 else f"torchrun --nproc-per-node={NUM_RANKS}"
        self.command = f"{launcher} {METHOD}.py --resume {self.folder}"
        self.args, self.learner, self.step, self.rows = args, learner, 0, []
        self.values, self.start_time = defaultdict(list), time.time()
        if args.resume:
            ranks, self.step, self.rows, command = read_file(self.folder / "checkpoint.pt")[1]["run"]
            require(command.startswith(f"{launcher} {METHOD}.py "), f"this run goes on by {command}")
            with explained(f"{self.folder} does not fit these arguments"):
                for name, part in learner.items():
                    typed = {"param_groups": part.state_dict()["param_groups"]} if "optimizer" in name else {}
                    part.load_state_dict(ranks[RANK][name] | typed)
            self.start_time -= self.rows[-1]["seconds"] if self.rows else 0

    def start(self):
        """Makes the folder, a first checkpoint and the trackers."""
        args, folder = self.args, self.folder
        if RANK == 0:
            folder.mkdir(parents=True, exist_ok=True)
            atexit.register(print, f"{self.command}\npython {METHOD}.py --evaluate {folder}/policy.pt")
            if args.tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                self.writer = SummaryWriter(str(folder))
            if args.track:
                import wandb
                self.wandb = wandb.init(id=folder.name, resume="allow", config=asdict(args), dir=folder)
        self.bar = progress(total=args.total_timesteps, initial=self.step, unit="step", leave=True)
        self.save_checkpoint()

    def advance(self):
        """Counts a step of all environments. Returns: the updates due, 0 until every rank has a batch."""
        before, self.step = self.step, self.step + self.args.num_envs * NUM_RANKS
        buffer, ratio = self.learner["buffer"], self.args.utd_ratio
        ready = torch.tensor(float(buffer.size >= self.args.batch_size), device=buffer.steps.device)
        return int(self.step * ratio) - int(before * ratio) if average_over_ranks([ready])[0] == 1 else 0

    def is_due(self, interval):
        return self.step % interval < self.args.num_envs * NUM_RANKS or self.step >= self.args.total_timesteps

    def record(self, values):
        for name, value in values.items():
            self.values[name].append(value)  # .item() would wait for the device

    def write_row(self):
        """Adds a row of means to metrics.csv. Raises: UserError if a loss was not finite."""
        means = {name: float(sum(values)) / len(values) for name, values in self.values.items()}
        means["charts/buffer_size"] = self.learner["buffer"].size
        row = {"global_step": self.step, "seconds": round(time.time() - self.start_time, 1)} | means
        self.rows, self.values = [*self.rows, row], defaultdict(list)
        self.bar.update(self.step - self.bar.n)
        if RANK == 0:
            columns = list(dict.fromkeys(itertools.chain(*self.rows)))
            lines = [columns] + [[row.get(column, "") for column in columns] for row in self.rows]
            text = "".join(",".join(map(str, line)) + "\n" for line in lines)
            write_file(self.folder / "metrics.csv", text.encode())
            if self.args.tensorboard:
                for name, value in means.items():
                    self.writer.add_scalar(name, value, self.step)
            if self.args.track:
                self.wandb.log(means, step=self.step)
        for name, value in means.items():  # gradient_step kept it from the weights
            require(math.isfinite(value) or "losses/" not in name, f"{name} became NaN or infinite")

    def evaluate_and_save(self):
        """Evaluates, single samples while the critics know nothing, and writes the files."""
        policy, critic = self.learner["policy"], self.learner["target_critic"]
        n, videos = self.args.best_of_n if self.step else 1, self.folder / f"videos/step {self.step}"
        self.record(evaluate(policy, critic, self.args, n, videos))
        self.write_row()
        for name in ("policy.pt",) if self.step else ("policy.pt", "clone.pt"):
            save_file(self, name, {"policy": policy.state_dict(), "critic": critic.state_dict()})
        self.save_checkpoint()

    def save_checkpoint(self):
        state = {name: part.state_dict() for name, part in self.learner.items()}
        ranks = [state] * NUM_RANKS
        if NUM_RANKS > 1:
            dist.gather_object(state, ranks if RANK == 0 else None)
        save_file(self, "checkpoint.pt", {"run": (ranks, self.step, self.rows, self.command)})


def write_file(path, data):
    """Writes data; an older file stays until the new one is whole."""
    with open(path.with_suffix(".tmp"), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path.with_suffix(".tmp"), path)


def save_file(run, name, content):
    """On rank 0, writes content beside the arguments, less those of this command."""
    args, data = replace(run.args, save_dataset=None, resume=None, evaluate=None), io.BytesIO()
    if RANK == 0:
        torch.save({"args": asdict(args), "reporting": list(Environment.reporting)} | content, data)
        write_file(run.folder / name, data.getbuffer())


def read_file(path):
    """Returns: arguments, content. Raises: UserError."""
    with explained(f"{path} is not there, damaged, or not of these scripts"):
        with zipfile.ZipFile(path) as archive:
            require(not archive.testzip(), "a checksum is wrong")  # torch does not compare them
        content = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
        Environment.reporting.update(content["reporting"])
        return Args(**{k: v for k, v in content["args"].items() if hasattr(Args, k)}), content


def load_networks(path, networks):
    """Gives policies and critics the weights in a policy file. Raises: UserError."""
    _, content = read_file(path)
    with explained(f"{path} does not fit these arguments"):
        for name, network in networks.items():
            network.load_state_dict(content["policy" if "policy" in name else "critic"])


def load_policy(path, args=None):
    """Returns: arguments, the file's own if None, policy and critics."""
    args = args or read_file(path)[0]
    policy, critic, _ = make_networks(args)
    load_networks(path, {"policy": policy, "critic": critic})
    return args, policy, critic


# Precision and processes
def in_blocks(net, rows):
    """net(rows (..., B, in)), on a CPU in blocks that fit its cache."""
    size = math.ceil(2048 / math.prod(rows.shape[:-2])) if rows.device.type == "cpu" else rows.shape[-2]
    return torch.cat([net(block) for block in rows.split(size, dim=-2)], dim=-2)


def mixed_precision(args, device):
    """bfloat16 for matrix products, where the hardware has it."""
    able = CPU_BF16 if device.type == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=args.bf16 and able)


def start_process():
    """Connects the ranks of torchrun. Returns: the device."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if NUM_RANKS > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return torch.device("cuda" if cuda else "cpu")


def average_over_ranks(tensors):
    """Averages in place over the ranks. Returns: the tensors."""
    for tensor in tensors if dist.is_initialized() else ():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    return tensors


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
        raise UserError(f"{what}: {error}") from error


def check(args):
    """Raises: UserError for arguments no run can work with."""
    packages = {"tensorboard": "tensorboard", "track": "wandb", "capture_video": "moviepy"}
    for name, value in vars(args).items():
        option, least, most = f"--{name.replace('_', '-')}", LEAST.get(name, 1e-9), MOST.get(name, 2**31 - 1)
        if type(value) in (int, float):
            require(least <= value <= most, f"{option} {value} is not between {least} and {most}.")
        if value is True and name in packages:
            require(importlib.util.find_spec(packages[name]), f"{option} needs pip install {packages[name]}.")
    require(args.batch_size <= args.buffer_size, "--buffer-size is below --batch-size.")
    require(args.dataset != "none" or not args.save_dataset, "--save-dataset needs a --dataset.")
    if not args.evaluate:  # environments begin anew then
        longest = (Environment(args).env.spec.max_episode_steps or 1) * args.num_envs * NUM_RANKS
        require(args.eval_interval >= longest, f"--eval-interval is below an episode's {longest} steps.")


def main():
    """Evaluates or trains; what users get wrong ends in a sentence."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clusters send it
    try:
        args = tyro.cli(Args)
        file = args.evaluate or (args.resume / "checkpoint.pt" if args.resume else args.policy)
        if file:  # what is typed counts
            saved, _ = read_file(file)
            if args.evaluate:
                saved = replace(saved, tensorboard=False, track=False, capture_video=False)
            args = tyro.cli(Args, default=saved)
        check(args)
        torch.set_num_threads(args.torch_threads or torch.get_num_threads())
        if not args.evaluate:
            return train(args)
        _, policy, critic = load_policy(args.evaluate, args)
        evaluate(policy, critic, args, args.best_of_n, args.evaluate.parent / "videos" / args.env_id)
    except KeyboardInterrupt:
        sys.exit(130)
    except (UserError, OSError, MemoryError) as error:
        tqdm.write(f"{METHOD}.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
