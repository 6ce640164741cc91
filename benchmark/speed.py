"""Times the updates of poco.py and ogpo.py beside the same updates in JAX, and against a limit.

    pip install -r requirements.txt -r benchmark/requirements.txt
    python benchmark/speed.py                        every size, torch and JAX in turns
    python benchmark/speed.py --only poco-paper      the sizes whose names contain this
    python benchmark/speed.py --scaling              also: time against N, K, batch, chunk and buffer size
    python benchmark/speed.py --device cuda          updates per second: eager and compiled

The limit is the time of the matrix products alone. Leave the machine to it: threads that wait for a busy core
spoil every number. Letters in shapes are those of the scripts; R is the candidates or chains of all states.
"""

import copy
import itertools
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ogpo
import poco

try:
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen
except ImportError:
    jax = None

OBS_DIM, ACTION_DIM = 28, 4
SIZES = {
    "poco-paper": poco.Args(
        hidden_dim=512, num_candidates=32, flow_steps=10, batch_size=256, posterior_batch_size=256
    ),
    "poco-small": poco.Args(
        hidden_dim=256, num_candidates=16, flow_steps=10, batch_size=64, posterior_batch_size=64
    ),
    "poco-medium": poco.Args(
        hidden_dim=256, num_candidates=16, flow_steps=5, batch_size=256, posterior_batch_size=256
    ),
    "poco-default": poco.Args(),
    "ogpo-paper": ogpo.Args(
        hidden_dim=512, group_size=32, flow_steps=10, num_critics=10, batch_size=256, ppo_batch_size=256
    ),
    "ogpo-default": ogpo.Args(),
}


@dataclass
class Args:
    only: str = ""  # the sizes whose names contain this
    rounds: int = 7  # what is printed are medians over rounds
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes CUDA where there is one
    torch_threads: int | None = None  # CPU threads of torch; JAX gets as many cores
    peer: bool = True  # time JAX too
    scaling: bool = False  # show how time and memory grow with the sizes


# Torch: the scripts' own functions
class Torch:
    """Networks, optimisers and random data for the updates of one script."""

    def __init__(self, args: poco.Args | ogpo.Args, device: str = "cpu"):
        torch.manual_seed(0)
        self.args, self.script, chunk_dim = (
            args,
            ogpo if isinstance(args, ogpo.Args) else poco,
            args.chunk_size * ACTION_DIM,
        )
        self.policy = self.script.FlowPolicy(OBS_DIM, chunk_dim, args.hidden_dim, args.flow_steps).to(device)
        self.critic = self.script.CriticEnsemble(OBS_DIM, chunk_dim, args.num_critics, args.hidden_dim).to(
            device
        )
        self.buffer = random_buffer(20_000, args, device)
        for network in (self.policy, self.critic):
            network.normalize.fit(self.buffer)
        self.target_critic = copy.deepcopy(self.critic)
        self.old_policy, self.slow_policy = copy.deepcopy(self.policy), copy.deepcopy(self.policy)
        adam = partial(torch.optim.Adam, fused=True)
        self.policy_optimizer = adam(
            self.policy.parameters(), lr=getattr(args, "ppo_learning_rate", args.learning_rate)
        )
        self.critic_optimizer = adam(self.critic.parameters(), lr=args.learning_rate)
        self.batch = self.buffer.sample(args.batch_size)
        compiled = partial(torch.compile, mode="reduce-overhead", disable=not args.compile)
        self.steps = compiled(self.script.update_critic), compiled(self.script.update_policy)

    def update_critic(self, batch):
        networks = self.policy, self.critic, self.target_critic
        return self.steps[0](*networks, self.critic_optimizer, batch, self.args)

    def update_policy(self, batch):
        networks = (self.policy,) if self.script is poco else (self.policy, self.old_policy, self.slow_policy)
        batches = (batch,) if self.script is poco else (batch, batch)
        return self.steps[1](*networks, self.target_critic, self.policy_optimizer, *batches, self.args)

    def update(self):
        batch = self.buffer.sample(self.args.batch_size)
        return self.update_critic(batch), self.update_policy(batch)

    def seconds(self, repeats: int) -> np.ndarray:
        """Mean times of the critics' update, the candidates, the policy's loss and step, all three: (4,)."""
        marks, name = (
            [],
            "bc_loss" if self.script is poco else "velocity",
        )  # what the loss asks first of the policy being trained
        method, total = getattr(self.policy, name), np.zeros(4)

        def marked(*args, **kwargs):
            marks.append(time.perf_counter())
            return method(*args, **kwargs)

        with mock.patch.object(self.policy, name, marked):
            for _ in range(repeats):
                begin = time.perf_counter()
                self.update_critic(self.batch)
                middle = time.perf_counter()
                marks.clear()
                self.update_policy(self.batch)
                end = time.perf_counter()
                total += middle - begin, marks[0] - middle, end - marks[0], end - begin
        return total / repeats


def random_buffer(size: int, args, device: str) -> poco.ReplayBuffer:
    """A full buffer of random episodes of 50 steps."""
    buffer, rng = (
        poco.ReplayBuffer(size, OBS_DIM, ACTION_DIM, args.chunk_size, args.gamma, device),
        np.random.default_rng(0),
    )
    for _ in range(size // 50):
        obs, actions = rng.standard_normal((51, OBS_DIM), np.float32), rng.uniform(-1, 1, (50, ACTION_DIM))
        buffer.add_episode(poco.Trajectory(obs, actions, -2 * rng.random(50), terminated=False, success=0.0))
    return buffer


def layers(network) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Kernels and biases of a policy, (in, out) and (out,), or of critics, (M, in, out) and (M, out)."""
    weights, biases = (
        [p for name, p in network.named_parameters() if name.endswith(kind)] for kind in ("weight", "bias")
    )
    kernels = [weight.mT if weight.ndim == 2 else weight for weight in weights]
    return [
        (kernel, bias.reshape(*kernel.shape[:-2], -1)) for kernel, bias in zip(kernels, biases, strict=True)
    ]


def widths(network) -> list[int]:
    """Input, hidden layers and output of a policy or of one critic."""
    return [kernel.shape[-2] for kernel, _ in layers(network)] + [layers(network)[-1][0].shape[-1]]


# JAX: the same updates as pure functions of state, batch and noise
if jax:

    class MLP(linen.Module):
        widths: list[int]
        layer_norm: bool = False

        @linen.compact
        def __call__(self, x):
            for width in self.widths[:-1]:
                x = linen.Dense(width)(x)
                x = (
                    linen.LayerNorm(epsilon=1e-5, use_bias=False, use_scale=False)(x)
                    if self.layer_norm
                    else x
                )
                x = linen.silu(x)
            return linen.Dense(self.widths[-1])(x)


def to_jax(tensor: torch.Tensor):
    return jnp.array(tensor.detach().cpu().numpy())


def flax_params(network):
    """A copy of a torch network's weights, named as flax names them."""
    return {
        "params": {
            f"Dense_{i}": {"kernel": to_jax(w), "bias": to_jax(b)} for i, (w, b) in enumerate(layers(network))
        }
    }


class Peer:
    """What both methods share."""

    def __init__(self, side: Torch):
        self.args = args = side.args
        self.mean, self.std = to_jax(side.policy.normalize.mean), to_jax(side.policy.normalize.std)
        self.reward_scale = to_jax(side.critic.normalize.reward_scale)
        self.policy_net = MLP(widths(side.policy)[1:])
        ensemble = linen.vmap(
            MLP,
            in_axes=None,
            axis_size=args.num_critics,
            variable_axes={"params": 0},
            split_rngs={"params": True},
        )
        self.critic_net = ensemble(widths(side.critic)[1:], layer_norm=True)
        self.adam = {
            "policy": optax.adam(getattr(args, "ppo_learning_rate", args.learning_rate)),
            "critic": optax.adam(args.learning_rate),
        }
        self.followers = (
            {"old_policy": args.policy_tau, "slow_policy": args.chi2_tau} if side.script is ogpo else {}
        )
        self.state = {
            name: flax_params(getattr(side, name))
            for name in ("policy", "critic", "target_critic", *self.followers)
        }
        self.state |= {f"{name}_adam": adam.init(self.state[name]) for name, adam in self.adam.items()} | {
            "key": jax.random.key(0)
        }
        self.batch = jax.tree.map(to_jax, side.batch)
        steps = self.update_critic, self.update_policy, self.update
        self.critic_step, self.policy_step, self.step = (
            jax.jit(partial(self.with_noise, step), donate_argnums=0) for step in steps
        )
        self.find_candidates = jax.jit(
            lambda state, batch: self.candidates(state, batch, self.draw(state["key"])[1])
        )

    def with_noise(self, update, state, *inputs):
        key, draw = jax.random.split(state["key"])
        return update(state | {"key": key}, *inputs, self.draw(draw))

    def noise(self, key, *shape):  # chunks (*shape, D) and times (*shape, 1)
        keys = jax.random.split(key)
        return jax.random.normal(keys[0], (*shape, self.batch.chunk.shape[1])), jax.random.uniform(
            keys[1], (*shape, 1)
        )

    def velocity(self, params, obs, x, t):
        return self.policy_net.apply(params, self.concatenate(obs, x, t))

    def q(self, params, obs, chunk):  # (M, B)
        return self.critic_net.apply(params, self.concatenate(obs, chunk))[..., 0]

    def concatenate(self, obs, *others):
        return jnp.concatenate([jnp.clip((obs - self.mean) / self.std, -10, 10), *others], axis=1)

    def sample(self, params, obs, x_0, finer=1):
        steps = finer * self.args.flow_steps

        def euler(x, t):
            return x + self.velocity(params, obs, x, jnp.full((len(x), 1), t)) / steps, None

        return jnp.clip(jax.lax.scan(euler, x_0, jnp.arange(steps) / steps)[0], -1, 1)

    def bc_loss(self, params, obs, chunk, valid, x_0, t):
        error = (self.velocity(params, obs, (1 - t) * x_0 + t * chunk, t) - (chunk - x_0)) ** 2
        mask = jnp.repeat(valid, chunk.shape[1] // valid.shape[1], axis=1)
        return (error * mask).sum(1) / mask.sum(1)

    def critic_loss(self, params, batch, target):
        known = jnp.maximum(batch.valid[:, -1], batch.terminated)
        q = self.q(params, batch.obs, batch.chunk)
        return ((q - target) ** 2 * known).sum() / (len(q) * jnp.maximum(known.sum(), 1))

    def gradient_step(self, state, name, loss, *inputs):
        value, gradient = jax.value_and_grad(loss)(state[name], *inputs)
        change, adam = self.adam[name].update(gradient, state[f"{name}_adam"])
        return state | {name: optax.apply_updates(state[name], change), f"{name}_adam": adam}, value

    def update_critic(self, state, batch, noise):
        next_q = self.q(
            state["target_critic"], batch.next_obs, self.sample(state["policy"], batch.next_obs, noise[0])
        ).mean(0)
        discount = self.args.gamma**self.args.chunk_size * (1 - batch.terminated)
        target = self.reward_scale * batch.reward + discount * next_q
        state, loss = self.gradient_step(state, "critic", self.critic_loss, batch, target)
        return state | {
            "target_critic": optax.incremental_update(state["critic"], state["target_critic"], self.args.tau)
        }, loss

    def update_policy(self, state, batch, found, noise):
        state, loss = self.gradient_step(state, "policy", self.policy_loss, batch, found, noise[2])
        return state | {
            name: optax.incremental_update(state["policy"], state[name], tau)
            for name, tau in self.followers.items()
        }, loss

    def update(self, state, batch, noise):
        state, critic_loss = self.update_critic(state, batch, noise)
        state, policy_loss = self.update_policy(state, batch, self.candidates(state, batch, noise[1]), noise)
        return state, (critic_loss, policy_loss)

    def run(self, step, *inputs):
        self.state, losses = step(self.state, self.batch, *inputs)
        return self.state, losses

    def seconds(self, repeats: int) -> np.ndarray:
        """As of Torch, each part a program of its own."""

        def find():
            return self.find_candidates(self.state, self.batch)

        found = jax.block_until_ready(find())
        calls = (
            partial(self.run, self.critic_step),
            find,
            partial(self.run, self.policy_step, found),
            partial(self.run, self.step),
        )
        return np.array([seconds_per_call(call, repeats) for call in calls])


class PocoPeer(Peer):
    def draw(self, key):
        keys, rows = jax.random.split(key, 4), self.args.posterior_batch_size * self.args.num_candidates
        loss_noise = self.noise(keys[2], rows), self.noise(keys[3], self.args.batch_size)
        return self.noise(keys[0], self.args.batch_size)[0], self.noise(keys[1], rows)[0], loss_noise

    def candidates(self, state, batch, x_0):
        obs = jnp.repeat(
            batch.obs[: self.args.posterior_batch_size], self.args.num_candidates, axis=0
        )  # (R, O)
        chunks = self.sample(state["policy"], obs, x_0, finer=2)
        q = self.q(state["target_critic"], obs, chunks).mean(0).reshape(-1, self.args.num_candidates)
        spread = jnp.maximum(q.std(1, ddof=1, keepdims=True), 1e-12)
        temperature = self.args.temperature or spread / math.sqrt(-math.log(self.args.effective_samples))
        return obs, chunks, jax.nn.softmax(q / temperature, axis=1)

    def policy_loss(self, params, batch, found, noise):
        obs, chunks, weights = found
        losses = self.bc_loss(params, obs, chunks, jnp.ones((len(obs), 1)), *noise[0]).reshape(weights.shape)
        bc_losses = self.bc_loss(params, batch.obs, batch.chunk, batch.valid, *noise[1])
        clip_threshold = self.args.clip_threshold or jnp.quantile(jax.lax.stop_gradient(bc_losses), 0.9)
        posterior = (weights * jnp.minimum(losses, clip_threshold)).sum(1).mean()
        return self.args.posterior_coef * posterior + bc_losses.mean()


class OgpoPeer(Peer):
    def draw(self, key):
        keys, rows, batch_size = (
            jax.random.split(key, 3),
            self.args.ppo_batch_size * self.args.group_size,
            self.args.batch_size,
        )
        chain_noise, _ = self.noise(keys[1], self.args.flow_steps + 1, rows)
        return self.noise(keys[0], batch_size)[0], chain_noise, self.noise(keys[2], batch_size)

    def chain_step(self, params, obs, x, t):
        v, dt, sigma = self.velocity(params, obs, x, t), 1 / self.args.flow_steps, self.args.sigma
        return x + dt * (v + sigma**2 / 2 * (t * v - x)), sigma * jnp.sqrt((1 - t) * dt)

    def sample_chain(self, params, obs, noise):  # (K + 1, R, D), (R,)
        def step(x, inputs):
            mean, std = self.chain_step(params, obs, x, jnp.full((len(x), 1), inputs[0]))
            x = mean + std * inputs[1]
            return x, (x, jax.scipy.stats.norm.logpdf(x, mean, std).mean(1))

        _, (chain, log_probs) = jax.lax.scan(
            step, noise[0], (jnp.arange(self.args.flow_steps) / self.args.flow_steps, noise[1:])
        )
        return jnp.concatenate([noise[:1], chain]), log_probs.mean(0)

    def chain_log_prob(self, params, obs, chain):  # (R,)
        steps, rows, dim = len(chain) - 1, *chain.shape[1:]
        t = jnp.repeat(jnp.arange(steps) / steps, rows)[:, None]
        mean, std = self.chain_step(params, jnp.tile(obs, (steps, 1)), chain[:-1].reshape(-1, dim), t)
        return (
            jax.scipy.stats.norm.logpdf(chain[1:].reshape(-1, dim), mean, std)
            .mean(1)
            .reshape(steps, rows)
            .mean(0)
        )

    def candidates(self, state, batch, noise):
        obs = jnp.repeat(batch.obs[: self.args.ppo_batch_size], self.args.group_size, axis=0)  # (R, O)
        chain, log_prob = self.sample_chain(state["old_policy"], obs, noise)
        q = self.q(state["target_critic"], obs, jnp.clip(chain[-1], -1, 1)).reshape(
            self.args.num_critics, -1, self.args.group_size
        )
        advantage = q - q.mean(2, keepdims=True)
        advantage = jnp.maximum(advantage.min(0), 0) + jnp.minimum(advantage.max(0), 0)
        advantage /= jnp.maximum(q.mean(0).std(1).mean(), 1e-12)
        return obs, chain, log_prob, advantage.flatten()

    def policy_loss(self, params, batch, found, noise):
        obs, chain, old_log_prob, advantage = found
        ratio, epsilon = (
            jnp.exp(self.chain_log_prob(params, obs, chain) - old_log_prob),
            self.args.clip_epsilon,
        )
        surrogate = jnp.minimum(
            ratio * advantage, jnp.clip(ratio, 1 - epsilon, 1 + epsilon) * advantage
        ).mean()
        return (
            self.args.success_coef * self.bc_loss(params, batch.obs, batch.chunk, batch.valid, *noise).mean()
            - surrogate
        )


PEERS = {poco: PocoPeer, ogpo: OgpoPeer}


def check_peer(script) -> float:
    """One update of both from the same weights and noise. Returns: the largest difference of the results."""
    sizes = (
        {"posterior_batch_size": 8}
        if script is poco
        else {"ppo_batch_size": 8, "group_size": 4, "num_critics": 3}
    )
    side = Torch(script.Args(bf16=False, hidden_dim=32, batch_size=16, flow_steps=3, **sizes))
    for network in (side.target_critic, side.old_policy, side.slow_policy):  # apart from what they follow
        for parameter in network.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
    peer, batch, names = PEERS[script](side), side.batch, ("policy", "critic", "target_critic")
    with jax.default_matmul_precision("float32"):
        noise = peer.draw(jax.random.key(1))
        theirs = [peer.velocity(peer.state["policy"], peer.batch.obs, noise[0], peer.batch.valid[:, :1])]
        theirs += [peer.q(peer.state["critic"], peer.batch.obs, peer.batch.chunk)]
        state, losses = peer.update(peer.state, peer.batch, noise)
        theirs += [
            *losses,
            *(
                layer[kind]
                for name in names
                for layer in state[name]["params"].values()
                for kind in ("kernel", "bias")
            ),
        ]
    chain = noise[1] if script is ogpo else [noise[1]]  # the chain's steps are drawn one by one
    draws = iter([torch.tensor(np.asarray(draw)) for draw in (noise[0], *chain, *jax.tree.leaves(noise[2]))])
    ours = [
        side.policy.velocity(batch.obs, torch.tensor(np.asarray(noise[0])), batch.valid[:, :1]),
        side.critic(batch.obs, batch.chunk),
    ]
    with mock.patch.multiple(
        torch, **dict.fromkeys(("randn", "randn_like", "rand_like"), lambda *args, **kwargs: next(draws))
    ):
        ours += [side.update_critic(batch)["losses/qf_loss"], side.update_policy(batch)["losses/actor_loss"]]
    ours += [tensor for name in names for layer in layers(getattr(side, name)) for tensor in layer]
    difference = max(
        np.abs(a.detach().numpy() - np.asarray(b)).max() for a, b in zip(ours, theirs, strict=True)
    )
    assert difference < 1e-4, f"JAX and {script.METHOD}.py differ by {difference:.1e}"
    return difference


# The limit
def matmul_rates(device: str) -> dict[str, float]:
    """FLOP/s of one large matrix product, best of several."""
    kinds = {
        "fp32": (torch.float32, "highest"),
        "tf32": (torch.float32, "high"),
        "bf16": (torch.bfloat16, "highest"),
    }
    before, n, rates = torch.get_float32_matmul_precision(), 8192 if device == "cuda" else 2048, {}
    for kind, (dtype, precision) in kinds.items():
        if kind != "tf32" or device == "cuda":
            torch.set_float32_matmul_precision(precision)
            a, b = torch.randn(2, n, n, device=device).to(dtype)
            rates[kind] = 2 * n**3 / min(seconds_per_call(partial(torch.mm, a, b), 1) for _ in range(8))
    torch.set_float32_matmul_precision(before)
    return rates


def copy_rate() -> float:
    """Bytes/s of reading and writing a large tensor on the GPU, best of several."""
    a, b = torch.empty(2, 2**30, dtype=torch.uint8, device="cuda")
    return 2 * a.nbytes / min(seconds_per_call(partial(a.copy_, b), 1) for _ in range(8))


def matmul_flops(side: Torch, of_layer=lambda i, o: 2 * i * o) -> np.ndarray:
    """FLOPs of an update's matrix products, two for a multiply-add: (4,), parts as in Torch.seconds.

    A gradient costs twice the forward pass, less that of the first layer's input, which nobody asks for. With
    another of_layer, the cost of one row in a layer of i inputs and o outputs, it counts something else.
    """
    args, batch = side.args, side.args.batch_size
    policy, critic = (
        sum(itertools.starmap(of_layer, itertools.pairwise(widths(network))))
        for network in (side.policy, side.critic)
    )
    train_policy, train_critic = (
        3 * policy - of_layer(*widths(side.policy)[:2]),
        3 * critic - of_layer(*widths(side.critic)[:2]),
    )
    sampling, value = args.flow_steps * policy, args.num_critics * critic
    if side.script is poco:
        rows = args.posterior_batch_size * args.num_candidates
        candidates, loss = rows * (2 * sampling + value), (rows + batch) * train_policy  # 2 K steps
    else:
        rows = args.ppo_batch_size * args.group_size
        candidates, loss = rows * (sampling + value), (rows * args.flow_steps + batch) * train_policy
    td = batch * (sampling + value + args.num_critics * train_critic)
    return np.array([td, candidates, loss, td + candidates + loss], float)


# What is printed
def seconds_per_call(call, count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        out = call()
    if jax:
        jax.block_until_ready(out)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count


def median_seconds(call, rounds: int) -> float:
    """Of a call, over rounds of 0.3 s."""
    seconds_per_call(call, 5 if torch.cuda.is_available() else 1)  # compiles, records graphs
    count = max(1, round(0.3 / seconds_per_call(call, 1)))
    return statistics.median(seconds_per_call(call, count) for _ in range(rounds))


def describe(name: str, side: Torch) -> None:
    fields = "hidden_dim", "flow_steps", "num_critics", "batch_size"
    fields += (
        ("num_candidates", "posterior_batch_size")
        if side.script is poco
        else ("group_size", "ppo_batch_size")
    )
    print(f"\n{name}: " + ", ".join(f"{field} {getattr(side.args, field)}" for field in fields))
    policy, critic = ("-".join(map(str, widths(network))) for network in (side.policy, side.critic))
    print(
        f"policy {policy}; each critic {critic}, LayerNorm; {matmul_flops(side)[-1] / 1e9:.1f} GFLOP"
    )


def time_parts(name: str, args: Args, rate: float) -> None:
    """The parts of an update on the CPU, torch and JAX in turns."""
    side = Torch(SIZES[name])
    describe(name, side)
    sides = [side, PEERS[side.script](side)] if jax and args.peer else [side]
    for s in sides:
        s.seconds(1)  # compiles
    repeats = [max(1, round(0.3 / s.seconds(1)[-1])) for s in sides]
    rounds = [
        [(s.seconds(1), s.seconds(count))[1] for s, count in zip(sides, repeats, strict=True)]
        for _ in range(args.rounds)
    ]
    medians = np.median(rounds, axis=0)  # (1 or 2, 4)
    limits = matmul_flops(side) / rate
    print(
        f"{'ms':<12}{'torch':>9}{'limit':>9}{'share':>7}"
        + f"{'JAX':>11}{'share':>7}{'JAX / torch':>13}" * (len(sides) - 1)
    )
    for i, part in enumerate(
        ("critics", "candidates", "M-step" if side.script is poco else "chain loss", "update")
    ):
        ours, theirs = medians[0, i], medians[-1, i]
        line = f"{part:<12}{1e3 * ours:>9.2f}{1e3 * limits[i]:>9.2f}{limits[i] / ours:>7.0%}"
        print(
            line + f"{1e3 * theirs:>11.2f}{limits[i] / theirs:>7.0%}{theirs / ours:>13.2f}" * (len(sides) - 1)
        )


def time_modes(name: str, args: Args, rate: float) -> None:
    """Whole updates on a GPU, the drawing of the batch included."""
    side, bandwidth = Torch(SIZES[name], "cuda"), copy_rate()
    describe(name, side)
    flops, calls = matmul_flops(side)[-1], {}
    moved = matmul_flops(side, lambda i, o: 2 * (i + o))[
        -1
    ]  # each layer reads its inputs and writes its outputs once, in bfloat16
    limit = min(rate / flops, bandwidth / moved)
    print(
        f"at most {limit:.0f} updates/s: {rate / flops:.0f} by FLOPs, "
        f"{bandwidth / moved:.0f} by the {moved / 1e9:.2f} GB between layers"
    )
    for compile_ in (False, True):
        mode = "torch compiled" if compile_ else "torch eager"
        calls[mode] = Torch(replace(SIZES[name], compile=compile_), "cuda").update
    if jax and args.peer and jax.default_backend() == "gpu":
        peer = PEERS[side.script](side)
        calls["JAX"] = partial(peer.run, peer.step)
    for mode, call in calls.items():
        torch.compiler.reset()
        speed = 1 / median_seconds(call, args.rounds)
        print(f"{mode:<28}{speed:>9.1f} updates/s, {speed / limit:.0%} of the limit")


def time_environment(rounds: int) -> None:
    envs, rng = [poco.Environment(poco.Args()) for _ in range(4)], np.random.default_rng(0)
    actions = partial(rng.uniform, -1, 1)
    stepping = poco.rollout(envs, lambda obs: actions((len(obs), 5 * ACTION_DIM)), itertools.count())
    milliseconds = 1e3 * median_seconds(lambda: next(stepping), rounds) / 4
    print(
        f"\nFetchPickAndPlace-v4: {milliseconds:.2f} ms for an environment step, 4 side by side, with resets"
    )


def show_scaling(device: str, rounds: int) -> None:
    """Time of a POCO update as one size grows; time of drawing a batch and memory as the buffer grows."""
    base = SIZES["poco-medium"]
    sweeps = {
        "num_candidates": (4, 8, 16, 32),
        "flow_steps": (2, 5, 10, 20),
        "batch_size": (64, 128, 256, 512),
        "chunk_size": (1, 5, 10),
    }
    print("\nms for an update of poco-medium with another")
    for field, values in sweeps.items():
        changes = [
            {field: value} | ({"posterior_batch_size": value} if field == "batch_size" else {})
            for value in values
        ]
        times = [
            1e3 * median_seconds(Torch(replace(base, **change), device).update, rounds) for change in changes
        ]
        print(
            f"{field:<16}" + "".join(f"{value:>6}: {t:<8.1f}" for value, t in zip(values, times, strict=True))
        )

    def resident():  # bytes that this process has in memory, where there is a /proc
        statm = Path("/proc/self/statm")
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else math.nan

    print(f"\n{'buffer size':<14}{'ms for a batch of 256':>22}{'MB of arrays':>14}{'MB more in use':>16}")
    for size in (10_000, 100_000, 1_000_000):
        before = resident()
        buffer = random_buffer(size, base, device)
        grown, arrays = resident() - before, buffer.steps.nbytes
        milliseconds = 1e3 * median_seconds(partial(buffer.sample, 256), rounds)
        print(f"{size:<14,}{milliseconds:>22.3f}{arrays / 1e6:>14.1f}{grown / 1e6:>16.1f}")


def main(args: Args) -> None:
    names = [name for name in SIZES if args.only in name]
    if not names:
        raise poco.UserError(f"--only {args.only} is part of none of {', '.join(SIZES)}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise poco.UserError(
            "--device cuda: torch finds no CUDA device here; type --device cpu or --device auto."
        )
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    if jax and device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if args.torch_threads:
        torch.set_num_threads(args.torch_threads)
        if hasattr(os, "sched_setaffinity"):  # JAX takes as many threads as it may use cores
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.torch_threads])

    able = torch.cpu.get_capabilities()
    bf16 = device == "cuda" or able.get("avx512_bf16") or able.get("amx_bf16")
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{able.get('cpu_name', 'CPU')}, {torch.get_num_threads()} threads"
    )
    rates = matmul_rates(device)
    load = f"; load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(
        f"{name}{load}; torch {torch.__version__}"
        + (f", JAX {jax.__version__} on {jax.default_backend()}" if jax else "")
    )
    print(
        "large products: " + ", ".join(f"{kind} {rate / 1e9:,.0f} GFLOP/s" for kind, rate in rates.items()),
        end="; ",
    )
    print(f"bf16 in hardware: {'yes' if bf16 else 'no'}; the limits below are at the best rate")
    if not jax:
        print("torch alone; to time JAX beside it: pip install -r benchmark/requirements.txt")
    elif args.peer:
        differences = ", ".join(f"{script.METHOD} {check_peer(script):.0e}" for script in PEERS)
        print(f"largest difference between one update in torch and in JAX: {differences}")
    for name in names:
        (time_modes if device == "cuda" else time_parts)(name, args, max(rates.values()))
    time_environment(args.rounds)
    if args.scaling:
        show_scaling(device, args.rounds)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except poco.UserError as error:
        print(f"speed.py: {error}", file=sys.stderr)
        sys.exit(2)
