"""Tests of poco.py and ogpo.py: equations against float64 NumPy, samplers against known distributions,
faults, and the command line. What stands in both files, which a test compares, is tested as poco.py's.
"""

import ast
import copy
import csv
import functools
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box

import ogpo
import poco
from poco import Args, Batch, CriticEnsemble, FlowPolicy, ReplayBuffer, Trajectory

SCRIPTS = {"poco": poco, "ogpo": ogpo}
ROOT = Path(poco.__file__).parent
both_scripts = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def prepared(monkeypatch):
    torch.manual_seed(0)
    for script in SCRIPTS.values():
        later = types.SimpleNamespace(register=print)  # not when pytest ends
        monkeypatch.setattr(script, "atexit", later)


# The two files
OWN = {"METHOD", "Args", "check_method", "update_critic", "update_policy", "train"}
OWN |= {"posterior_weights", "adaptive_temperature", "poco_loss", "draw_batch"}
OWN |= {"reduce_next_q", "chain_step", "sample_chain", "chain_log_prob", "group_advantage"}
OWN |= {"chi2_penalised_q", "ppo_loss", "Actors"}
LIMITS = {poco: (1040, 430), ogpo: (1140, 530)}  # lines, last line of train


def shared_lines(script):
    """The lines without a docstring and without a method's own definitions."""
    source = Path(script.__file__).read_text()
    lines = source.splitlines()
    body = ast.parse(source).body
    for node in body:
        targets = getattr(node, "targets", [node])
        names = {getattr(target, "id", getattr(target, "name", "")) for target in targets}
        if names & OWN or node is body[0]:
            first = min(part.lineno for part in [node, *getattr(node, "decorator_list", ())])
            lines[first - 1 : node.end_lineno] = [None] * (node.end_lineno - first + 1)
    return [line for line in lines if line]


def test_what_both_scripts_share_is_identical_to_the_letter():
    poco_lines = shared_lines(poco)
    assert len(poco_lines) > 500
    assert poco_lines == shared_lines(ogpo)


def test_common_arguments_have_the_same_order_type_default_and_comment():
    fields = []
    for script in SCRIPTS.values():
        block = Path(script.__file__).read_text().split(" Args:")[1].split("\n\n")[0]
        fields.append(dict(re.findall(r"\n    (\w+)(: .+? = .+?  # .+)", block)))
        assert list(fields[-1]) == list(vars(script.Args()))
    common = [name for name in fields[0] if name in fields[1]]
    assert len(common) > 25
    assert common == [name for name in fields[1] if name in fields[0]]
    assert all(fields[0][name] == fields[1][name] for name in common)


@both_scripts
def test_a_script_can_be_read_in_one_sitting(script):
    lines, end_of_train = LIMITS[script]
    source = Path(script.__file__).read_text()
    assert len(source.splitlines()) <= lines
    (train,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "train")
    assert train.end_lineno <= end_of_train
    nested = (ast.FunctionDef, ast.Lambda)
    assert not any(isinstance(node, nested) for part in train.body for node in ast.walk(part))


def test_no_line_of_code_is_above_100_columns_and_no_file_too_long():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmark/*.py")]:
        if path.name != "test_poco.py":
            assert all(len(line) <= 100 for line in path.read_text().splitlines()), path
    limits = {"test_poco.py": 1200, "README.md": 200, "benchmark/speed.py": 300}
    for name, limit in limits.items():
        assert len((ROOT / name).read_text().splitlines()) <= limit, name


def fit(network, obs):
    """Gives a network's normaliser the statistics of these observations."""
    network.encode.mean.copy_(obs.mean(0))
    network.encode.std.copy_(obs.std(0, correction=0))


def space(obs_dim, dtype=np.float32):
    return Box(-np.inf, np.inf, (obs_dim,), dtype) if dtype != np.uint8 else Box(0, 255, (obs_dim,), dtype)


def make_buffer(capacity, obs_dim, action_dim, chunk_size, gamma=0.9, dtype=np.float32):
    args = Args(buffer_size=capacity, chunk_size=chunk_size, gamma=gamma)
    return ReplayBuffer(args, space(obs_dim, dtype), action_dim)


# Flow policy
def numpy_velocity(policy, obs, x, t):
    """The network of FlowPolicy, written again in float64, with its normaliser."""
    w = {name: value.double().numpy() for name, value in policy.state_dict().items()}
    obs = np.clip((obs - w["encode.mean"]) / w["encode.std"], -10, 10)
    h = np.concatenate([obs, x, t], axis=1)
    for layer in (0, 2, 4):
        h = h @ w[f"net.{layer}.weight"].T + w[f"net.{layer}.bias"]
        h = h / (1 + np.exp(-h))  # SiLU
    return h @ w["net.6.weight"].T + w["net.6.bias"]


def numpy_bc_losses(policy, obs, chunk, valid, noise, t):
    """The flow-matching loss, written again; valid (B, T)."""
    error = (numpy_velocity(policy, obs, (1 - t) * noise + t * chunk, t) - (chunk - noise)) ** 2
    mask = np.repeat(valid, chunk.shape[1] // valid.shape[1], axis=1)
    return (error * mask).sum(1) / mask.sum(1)


def numpy_sample(policy, obs, noise, steps):
    x = noise
    for k in range(steps):
        x = x + numpy_velocity(policy, obs, x, np.full((len(x), 1), k / steps)) / steps
    return np.clip(x, -1, 1)


def tensors(*arrays):
    return [torch.tensor(array).float() for array in arrays]


def doubles(*given):
    return [tensor.double().numpy() for tensor in given]


@pytest.fixture
def flow():
    """A policy with statistics, and observations."""
    rng = np.random.default_rng(0)
    policy = FlowPolicy(obs_dim=3, chunk_dim=6, flow_steps=7)
    fit(policy, torch.tensor(rng.normal(2, 3, (50, 3))).float())
    return policy, rng.normal(size=(4, 3))


def test_bc_loss_is_the_flow_matching_loss_over_the_valid_entries(flow):
    policy, obs = flow
    chunk = np.random.default_rng(1).normal(size=(4, 6))
    valid = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])  # T = 3 actions of 2 numbers
    for mask in (valid, None):
        torch.manual_seed(1)
        given = tensors(chunk) if mask is None else tensors(chunk, mask)
        losses = policy.bc_loss(policy.encode(*tensors(obs)), *given)
        torch.manual_seed(1)
        drawn = doubles(torch.randn(4, 6), torch.rand(4, 1))
        expected = numpy_bc_losses(policy, obs, chunk, np.ones((4, 3)) if mask is None else mask, *drawn)
        np.testing.assert_allclose(losses.detach(), expected, rtol=1e-5)


@pytest.mark.parametrize(("given", "steps"), [(None, 7), (3, 3)])
def test_sample_takes_euler_steps_and_clamps(flow, given, steps):
    policy, obs = flow
    torch.manual_seed(1)
    sampled = policy.sample(policy.encode(*tensors(obs)), given)
    torch.manual_seed(1)
    expected = numpy_sample(policy, obs, *doubles(torch.randn(4, 6)), steps)
    np.testing.assert_allclose(sampled.detach(), expected, rtol=1e-4, atol=1e-6)
    assert policy.sample(torch.zeros(1000, 3)).abs().max() <= 1


def test_statistics_are_the_buffer_s_and_a_constant_is_only_shifted():
    policy, critic = FlowPolicy(3, 2), CriticEnsemble(3, 2, 2)
    obs = np.stack([np.full(100, 7.0), np.full(100, 1e-9), np.random.default_rng(0).normal(1, 5, 100)], axis=1)
    buffer = make_buffer(200, 3, 2, 2)
    buffer.add(Trajectory(obs, np.zeros((99, 2)), np.linspace(-4, 1, 99), False, 0.0))
    target_critic = copy.deepcopy(critic)
    poco.fit_statistics({"policy": policy, "critic": critic, "target_critic": target_critic}, buffer)
    assert critic.reward_scale == target_critic.reward_scale == 0.25  # of the largest |reward|
    features = policy.encode(torch.tensor(obs))
    assert features.dtype == torch.float32 and features[:, :2].abs().max() < 1e-3
    np.testing.assert_allclose(features[:, 2].mean(), 0, atol=1e-5)
    np.testing.assert_allclose(features[:, 2].std(correction=0), 1, rtol=1e-5)
    assert policy.encode(torch.tensor(obs) + 100).abs().max() <= 10
    other = FlowPolicy(3, 2)
    other.load_state_dict(policy.state_dict())  # they travel with it
    assert torch.equal(other.encode(torch.tensor(obs)), features)


# Critic
def numpy_q(critic, obs, chunk):
    """The critics, written again in float64. Returns: (M, B)."""
    w = {name: value.double().numpy() for name, value in critic.state_dict().items()}
    values = []
    for m in range(critic.num_critics):
        h = np.concatenate([(obs - w["encode.mean"]) / w["encode.std"], chunk], axis=1)
        for layer in (0, 3, 6):
            h = h @ w[f"net.{layer}.weight"][m] + w[f"net.{layer}.bias"][m]
            h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
            h = h / (1 + np.exp(-h))
        values.append((h @ w["head.weight"][m] + w["head.bias"][m])[:, 0])
    return np.array(values)


def test_critics_are_independent_networks_with_layer_norm():
    rng = np.random.default_rng(0)
    critic = CriticEnsemble(obs_dim=3, chunk_dim=2, num_critics=4, hidden_dim=16)
    fit(critic, torch.tensor(rng.normal(1, 2, (50, 3))).float())
    obs, chunk = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    q = critic(critic.encode(*tensors(obs)), *tensors(chunk))
    np.testing.assert_allclose(q.detach(), numpy_q(critic, obs, chunk), rtol=1e-4, atol=1e-5)
    assert q.std(0).min() > 1e-3  # members start apart


def test_critic_loss_leaves_out_what_a_time_limit_cut_short():
    q = torch.tensor([[1.0, 50.0], [3.0, 50.0]], requires_grad=True)
    target = torch.tensor([2.0, 0.0])
    loss = poco.critic_loss(q, target, torch.tensor([1.0, 0.0]))
    loss.backward()
    assert loss.item() == 1 and q.grad.tolist() == [[-1, 0], [1, 0]]
    assert poco.critic_loss(q, target, torch.zeros(2)) == 0  # none: no NaN


class Still(torch.nn.Module):
    """A policy that always takes the same chunk."""

    def __init__(self, chunk):
        super().__init__()
        self.chunk = torch.nn.Parameter(chunk)
        self.encode = torch.nn.Identity()

    def sample(self, features, flow_steps=None):
        return self.chunk.detach().expand(len(features), -1)


@pytest.mark.parametrize(("terminated", "n", "chunk_size"), [(True, 7, 5), (True, 4, 2), (False, 10, 2)])
def test_critic_converges_to_the_values_of_a_small_mdp(terminated, n, chunk_size):
    """A row of states whose last step is worth 1, with an end; or a ring of four, with a time limit."""
    gamma, length = 0.9, n if terminated else 4
    buffer = make_buffer(100, 8, 1, chunk_size, gamma)
    rewards, state = 1.0 * (np.arange(n) % length == length - 1), np.arange(n + 1) % (length + terminated)
    buffer.add(Trajectory(np.eye(8)[state], np.ones((n, 1)), rewards, terminated, 1.0))
    args = Args(chunk_size=chunk_size, gamma=gamma, tau=0.05)
    policy = Still(torch.ones(chunk_size))
    critic, target = (CriticEnsemble(8, chunk_size, 2, hidden_dim=32) for _ in range(2))
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3, fused=True)
    for _ in range(1000):
        poco.update_critic(policy, critic, target, optimizer, buffer.sample(32), args)
    values = [gamma ** (length - 1 - i) / (1 if terminated else 1 - gamma**4) for i in range(length)]
    q = critic(torch.eye(8)[:length], torch.ones(length, chunk_size))
    np.testing.assert_allclose(q.detach(), [values, values], rtol=0.05)


# POCO
@pytest.mark.parametrize("eta", [0.1, 1.0, 30.0])
def test_posterior_weights_are_a_softmax(eta):
    q = np.random.default_rng(0).normal(size=(6, 5))
    expected = np.exp(q / eta) / np.exp(q / eta).sum(1, keepdims=True)
    np.testing.assert_allclose(poco.posterior_weights(torch.tensor(q), eta), expected, rtol=1e-10)


def test_posterior_weights_of_extreme_values_are_finite_and_greedy():
    q = torch.randn(6, 5).double()
    greedy = torch.nn.functional.one_hot(q.argmax(1), 5).double()
    assert torch.equal(poco.posterior_weights(q, 1e-6), greedy)
    for extreme in ([[1e6, -1e6, 1e6]], [[-1e6, -1e6, -1e6]]):
        weights = poco.posterior_weights(torch.tensor(extreme), 1e-3)
        assert torch.isfinite(weights).all() and weights.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(("scale", "share"), [(1.0, 0.3), (-50.0, 0.1), (1e-3, 0.7)])
def test_adaptive_temperature_gives_the_effective_samples_at_any_scale_of_q(scale, share):
    values = scale * np.random.default_rng(0).normal(size=(4, 20_000)) * [[1], [3], [0.1], [7]]
    eta = poco.adaptive_temperature(torch.tensor(values), share)
    np.testing.assert_allclose(eta[:, 0], values.std(1) / np.sqrt(np.log(1 / share)), rtol=1e-4)
    samples = 1 / poco.posterior_weights(torch.tensor(values), eta).square().sum(1)
    np.testing.assert_allclose(samples / 20_000, share, rtol=0.25)


def test_equal_values_get_equal_weights():
    equal = torch.full((1, 5), 3.0)
    eta = poco.adaptive_temperature(equal, 0.3)
    assert (poco.posterior_weights(equal, eta) == 0.2).all()


@pytest.mark.parametrize(("beta", "zeta"), [(1.0, 0.4), (0.3, 1.0), (0.0, 0.5)])
def test_poco_loss_is_equation_23(beta, zeta):
    rng = np.random.default_rng(0)
    losses, bc, weights = rng.exponential(size=(7, 4)), rng.exponential(size=9), rng.dirichlet(np.ones(4), 7)
    posterior = sum(weights[s, j] * min(losses[s, j], zeta) for s in range(7) for j in range(4)) / 7
    loss = poco.poco_loss(*map(torch.tensor, (losses, weights, bc)), beta, zeta)
    assert loss.item() == pytest.approx(beta * posterior + bc.mean(), rel=1e-12)


def test_a_candidate_beyond_the_clip_gives_no_gradient():
    policy = FlowPolicy(obs_dim=2, chunk_dim=2)
    obs, chunk = torch.randn(2, 2), torch.tensor([[0.1, 0.1], [30.0, -30.0]])
    for row in (0, 1):
        losses = policy.bc_loss(obs, chunk)
        assert losses[0] < 20 < losses[1]
        loss = poco.poco_loss(losses.view(1, 2), torch.eye(2)[[row]], torch.zeros(1), 1.0, 20.0)
        gradient = sum(part.abs().sum() for part in torch.autograd.grad(loss, list(policy.parameters())))
        assert (gradient > 1e-3) if row == 0 else (gradient == 0)


def random_batch(n, obs_dim, action_dim, chunk_size):
    valid = (torch.arange(chunk_size) < torch.randint(1, chunk_size + 1, (n, 1))).float()
    obs, next_obs = torch.randn(2, n, obs_dim)
    chunk = torch.rand(n, chunk_size * action_dim) * 2 - 1
    return Batch(obs, chunk, torch.randn(n), next_obs, torch.zeros(n), valid)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.2, "clip_threshold": 0.9, "posterior_coef": 0.5}])
def test_poco_s_update_as_a_whole(settings):
    """The random numbers drawn again in their order, everything else in NumPy."""
    args = Args(num_candidates=4, posterior_batch_size=3, chunk_size=2, flow_steps=3, **settings)
    policy, critic, batch = FlowPolicy(3, 4, flow_steps=3), CriticEnsemble(3, 4, 2), random_batch(8, 3, 2, 2)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    torch.manual_seed(5)
    metrics = poco.update_policy(policy, critic, optimizer, batch, args)

    torch.manual_seed(5)
    states = torch.rand(8).argsort()[:3]
    drawn = [torch.randn(12, 4), torch.randn(12, 4), torch.rand(12, 1), torch.randn(8, 4), torch.rand(8, 1)]
    noise, x_0, t, *batch_drawn = doubles(*drawn)
    obs = np.repeat(batch.obs[states].double().numpy(), 4, axis=0)
    candidates = numpy_sample(policy, obs, noise, 6)  # twice K
    q = numpy_q(critic, obs, candidates).mean(0).reshape(3, 4)
    eta = args.temperature or q.std(1, ddof=1, keepdims=True) / np.sqrt(-np.log(args.effective_samples))
    weights = np.exp((q - q.max(1, keepdims=True)) / eta)
    weights /= weights.sum(1, keepdims=True)
    losses = numpy_bc_losses(policy, obs, candidates, np.ones((12, 1)), x_0, t).reshape(3, 4)
    bc = numpy_bc_losses(policy, *doubles(batch.obs, batch.chunk, batch.valid), *batch_drawn)
    zeta = args.clip_threshold or np.quantile(bc, 0.9)
    expected = args.posterior_coef * (weights * np.minimum(losses, zeta)).sum(1).mean() + bc.mean()
    assert metrics["losses/actor_loss"].item() == pytest.approx(expected, rel=1e-4)
    assert metrics["losses/bc_loss"].item() == pytest.approx(bc.mean(), rel=1e-4)
    assert metrics["losses/clip_fraction"].item() == pytest.approx((losses > zeta).mean())
    samples = (1 / (weights**2).sum(1)).mean()
    assert metrics["losses/effective_samples"].item() == pytest.approx(samples, rel=1e-3)


def test_every_state_of_a_batch_gets_its_turn_in_the_e_step():
    seen = []

    class Watched(Still):
        def sample(self, features, flow_steps=None):
            seen.append(features[:, 0].int().tolist())
            return super().sample(features)

        def bc_loss(self, features, chunk, valid=None):
            return ((chunk - self.chunk) ** 2).mean(1)

    policy = Watched(torch.zeros(2))
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    args = Args(num_candidates=3, posterior_batch_size=4)
    batch = random_batch(12, 1, 1, 2)._replace(obs=torch.arange(12.0)[:, None])
    for _ in range(40):
        poco.update_policy(policy, CriticEnsemble(1, 2, 2), optimizer, batch, args)
        states = seen[-1][::3]
        assert len(set(states)) == 4 and seen[-1] == [state for state in states for _ in range(3)]
    counts = np.bincount([state for states in seen for state in states[::3]], minlength=12)
    assert counts.min() >= 5  # of 160 draws, 13 each


def bandit_values(features, chunk):
    """Only +0.5 is worth something. Stands for two critics, (M, B)."""
    return (chunk.T > 0).float() * torch.tensor([[1.0], [2.0]])


bandit_values.encode = torch.nn.Identity()


def bandit_chunks():
    return torch.where(torch.rand(128, 1) < 0.2, 0.5, -0.5) + 0.05 * torch.randn(128, 1)


def share_of_the_better_mode(policy):
    return (policy.sample(torch.zeros(4000, 1)) > 0).float().mean()


@functools.cache
def bandit_clone():
    """A policy with 80 % of its mass at -0.5 and 20 % at +0.5."""
    policy = FlowPolicy(obs_dim=1, chunk_dim=1, hidden_dim=32, flow_steps=5)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3, fused=True)
    for _ in range(600):
        poco.gradient_step(optimizer, policy.bc_loss(torch.zeros(128, 1), bandit_chunks()).mean())
    return policy


def poco_bandit(policy, temperature, steps=300):
    """Returns: the better mode's share after POCO, and metrics."""
    args = Args(num_candidates=8, posterior_batch_size=64, posterior_coef=3.0, temperature=temperature)
    args.clip_threshold, policy = temperature and 5.0, copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = Batch(torch.zeros(128, 1), bandit_chunks(), None, None, None, torch.ones(128, 1))
        metrics = poco.update_policy(policy, bandit_values, optimizer, batch, args)
    return share_of_the_better_mode(policy), metrics


def test_a_clone_samples_both_modes_in_proportion():
    assert share_of_the_better_mode(bandit_clone()) == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("temperature", [0.05, None], ids=["fixed", "adaptive"])
def test_poco_moves_the_mass_to_the_better_mode(temperature):
    share, metrics = poco_bandit(bandit_clone(), temperature)
    assert share > 0.45  # a fixed point between the buffer's 0.2 and the posterior's nearly 1
    assert 0 < metrics["losses/clip_fraction"] < 0.2 and 1 <= metrics["losses/effective_samples"] <= 8


def test_uniform_weights_teach_nothing():
    assert poco_bandit(bandit_clone(), temperature=1e6)[0] < 0.35


# OGPO
class MixtureFlow:
    """The exact flow from N(0, I) to a mixture of Gaussians N(means_c, std^2 I), in float64."""

    def __init__(self, means, std, shares, flow_steps=50):
        self.means, self.std, self.shares = torch.tensor(means).double(), std, torch.tensor(shares).double()
        self.chunk_dim, self.flow_steps = self.means.shape[1], flow_steps

    def velocity(self, features, x, t):
        var = (1 - t) ** 2 + (t * self.std) ** 2  # of every component of x_t
        rel = x[:, None] - t[:, None] * self.means  # (B, C, D)
        share = torch.softmax(self.shares.log() - rel.square().sum(2) / (2 * var), dim=1)
        v = self.means + ((t * self.std**2 - (1 - t)) / var)[:, None] * rel  # E[x_1 - x_0 | x_t, component]
        return (share[..., None] * v).sum(1)


GAUSSIAN = MixtureFlow([[0.4, -0.3]], 0.3, [1.0])
TWO_MODES = MixtureFlow([[0.6, 0.6], [-0.4, -0.4]], 0.1, [0.3, 0.7])


def own_chain(policy, features, sigma, without):
    """The stochastic sampler, without one of its two parts. Returns: (1, B, D), the last."""
    x, dt = torch.randn(len(features), policy.chunk_dim).double(), 1 / policy.flow_steps
    for k in range(policy.flow_steps):
        t = torch.full_like(x[:, :1], k * dt)
        v = policy.velocity(features, x, t)
        drift = v if without == "score" else v + sigma**2 / 2 * (t * v - x)
        scale = 1.0 if without == "sqrt dt" else dt**0.5
        x = x + drift * dt + sigma * torch.sqrt(1 - t) * scale * torch.randn_like(x)
    return x[None]


def assert_marginals(sampler, flow, sigma, n=4000):
    """Mean, covariance and mode shares lie within 4.5 standard errors of the ODE's: those with sigma 0."""
    x = torch.stack([sampler(flow, torch.zeros(n, 1), s)[-1] for s in (sigma, 0.0)])
    moments = torch.cat([x, x**2, x.prod(2, keepdim=True), (x[..., :1] > 0.1).double()], dim=2)  # (2, n, 6)
    difference, variance = moments.mean(1).diff(dim=0).abs(), moments.var(1).sum(0)
    assert (difference < 4.5 * torch.sqrt(variance / n)).all()
    for mode in (x[0, :, 0] > 0.1, x[0, :, 0] <= 0.1) if flow is TWO_MODES else ():
        assert x[0, mode].std(0).max() < 0.1 * 1.08 and x[0, mode].std(0).min() > 0.1 * 0.88


both_flows = pytest.mark.parametrize("flow", [GAUSSIAN, TWO_MODES], ids=["gaussian", "two modes"])


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5, 1.0])
@both_flows
def test_the_stochastic_sampler_keeps_the_marginals_of_the_ode(flow, sigma):
    assert_marginals(lambda *args: ogpo.sample_chain(*args)[0], flow, sigma)


@pytest.mark.parametrize(("without", "sigma"), [("score", 0.5), ("score", 1.0), ("sqrt dt", 0.1), ("sqrt dt", 1.0)])
@both_flows
def test_a_sampler_without_one_of_its_parts_does_not(flow, without, sigma):
    assert_marginals(functools.partial(own_chain, without=""), flow, sigma)
    with pytest.raises(AssertionError):
        assert_marginals(functools.partial(own_chain, without=without), flow, sigma)


def numpy_log_prob(policy, obs, chain, sigma):
    """log N(x_{k+1}; mean, std^2) of every step and dimension, averaged. Args: chain (K + 1, B, D)."""
    steps = len(chain) - 1
    total = 0
    for k in range(steps):
        t, x = k / steps, chain[k]
        v = numpy_velocity(policy, obs, x, np.full((len(x), 1), t))
        sigma_t, score = sigma * np.sqrt(1 - t), (t * v - x) / (1 - t)
        mean, std = x + (v + sigma_t**2 / 2 * score) / steps, sigma_t / np.sqrt(steps)
        total += -(((chain[k + 1] - mean) / std) ** 2) / 2 - np.log(std) - np.log(2 * np.pi) / 2
    return total.mean(1) / steps


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_chain_log_prob_is_that_of_the_chain_s_normal_steps(flow, sigma):
    policy, obs = flow
    features = policy.encode(*tensors(obs))
    chain, own_log_prob = ogpo.sample_chain(policy, features, sigma)
    other = chain + 0.01 * torch.randn_like(chain)
    for points in (chain, other):
        log_prob = ogpo.chain_log_prob(policy, features, points, sigma).detach()
        expected = numpy_log_prob(policy, obs, points.double().numpy(), sigma)
        np.testing.assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-4)
    expected = numpy_log_prob(policy, obs, chain.double().numpy(), sigma)
    np.testing.assert_allclose(own_log_prob, expected, rtol=1e-4, atol=1e-4)


def numpy_conservative(q):
    """The advantage nearest to zero where all critics agree on its sign, else 0."""
    advantage = q - q.mean(2, keepdims=True)
    nearest = np.zeros(q.shape[1:])
    for s, j in np.ndindex(*nearest.shape):
        members = advantage[:, s, j]
        if (members > 0).all() or (members < 0).all():
            nearest[s, j] = members[np.abs(members).argmin()]
    return nearest


def test_the_plain_advantage_is_the_critics_mean_over_the_group_s():
    q = np.random.default_rng(0).normal(size=(3, 6, 4))
    expected = (q - q.mean(2, keepdims=True)).mean(0)
    np.testing.assert_allclose(ogpo.group_advantage(torch.tensor(q), False), expected, rtol=1e-10)


def test_the_conservative_advantage_is_zero_where_critics_disagree():
    q = np.random.default_rng(0).normal(size=(3, 6, 4))
    expected = numpy_conservative(q)
    np.testing.assert_allclose(ogpo.group_advantage(torch.tensor(q), True), expected, rtol=1e-10)
    assert 0 < (expected == 0).mean() < 1


@pytest.mark.parametrize(("how", "reduce"), [("mean", np.mean), ("median", np.median)])
def test_next_values_are_reduced(how, reduce):
    q = np.random.default_rng(0).normal(size=(6, 4))
    np.testing.assert_allclose(ogpo.reduce_next_q(torch.tensor(q), how), reduce(q, axis=1))


def test_the_chi_squared_penalty():
    rng = np.random.default_rng(0)
    q, ratio = rng.normal(size=(3, 6, 4)), rng.exponential(size=(6, 4))
    w = 1 / (1 + np.exp(-5 * (ratio - 1)))
    expected = (1 - w) * q.mean(0) + w * q.min(0) - 0.1 * q.std(0) * ratio
    penalised = ogpo.chi2_penalised_q(torch.tensor(q), torch.tensor(ratio), 0.1, 5.0)
    np.testing.assert_allclose(penalised, expected, rtol=1e-10)
    for r, expected in ((4.0, q.min(0)), (0.01, q.mean(0))):  # far from the slow policy, and near it
        penalised = ogpo.chi2_penalised_q(torch.tensor(q), torch.full((6, 4), r).double(), 0.0, 20.0)
        np.testing.assert_allclose(penalised, expected, atol=1e-6)


def test_ppo_loss_is_the_clipped_surrogate():
    log_prob, old_log_prob, advantage = np.random.default_rng(0).normal(size=(3, 200)) * [[0.05], [0.05], [1.0]]
    ratio = np.exp(log_prob - old_log_prob)
    pairs = zip(ratio, advantage, strict=True)
    expected = -np.mean([min(r * a, np.clip(r, 0.97, 1.03) * a) for r, a in pairs])
    loss, metrics = ogpo.ppo_loss(*map(torch.tensor, (log_prob, old_log_prob, advantage)), 0.03)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert metrics["losses/clip_fraction"].item() == pytest.approx((np.abs(ratio - 1) > 0.03).mean())


def test_ppo_s_gradient_ends_where_the_ratio_has_gone_far_enough():
    log_prob = torch.tensor([0.1, 0.1, -0.1, -0.1], requires_grad=True)
    ogpo.ppo_loss(log_prob, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.05)[0].backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([0, 1, -1, 0]) * log_prob.detach().exp() / 4)


def nudged(policy, size=0.02):
    """A copy of the policy with noise on its weights."""
    other = copy.deepcopy(policy)
    for parameter in other.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return other


@pytest.mark.parametrize("settings", [{}, {"conservative": False, "chi2_coef": 0.3, "success_coef": 0.5}])
def test_ogpo_s_update_as_a_whole(settings):
    """The random numbers drawn again in their order, everything else in NumPy."""
    args = ogpo.Args(group_size=4, ppo_batch_size=3, chunk_size=2, flow_steps=3, sigma=0.8, **settings)
    policy = FlowPolicy(3, 4, flow_steps=3)
    actors = ogpo.Actors(policy, nudged(policy), nudged(policy))
    critic = CriticEnsemble(3, 4, args.num_critics)
    batch, successes = random_batch(8, 3, 2, 2), random_batch(5, 3, 2, 2)
    before = [copy.deepcopy(actor) for actor in actors]
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    torch.manual_seed(5)
    metrics = ogpo.update_policy(actors, critic, optimizer, batch, successes, args)

    torch.manual_seed(5)
    obs = np.repeat(batch.obs[:3].double().numpy(), 4, axis=0)
    x = torch.randn(12, 4).double().numpy()
    chain = [x]
    for k in range(3):
        t = k / 3
        v = numpy_velocity(before[1], obs, x, np.full((12, 1), t))
        mean, std = x + (v + 0.8**2 / 2 * (t * v - x)) / 3, 0.8 * np.sqrt((1 - t) / 3)
        x = mean + std * torch.randn(12, 4).double().numpy()
        chain.append(x)
    chain = np.array(chain)
    new, old, slow = (numpy_log_prob(actor, obs, chain, 0.8) for actor in before)
    q = numpy_q(critic, obs, np.clip(x, -1, 1)).reshape(-1, 3, 4)
    if args.chi2_coef:
        ratio = np.exp(new - slow).reshape(3, 4)
        w = 1 / (1 + np.exp(-args.chi2_sharpness * (ratio - 1)))
        value = (1 - w) * q.mean(0) + w * q.min(0) - args.chi2_coef * q.std(0) * ratio
        q = q + value - q.mean(0)
    advantage = numpy_conservative(q) if args.conservative else (q - q.mean(2, keepdims=True)).mean(0)
    advantage = (advantage / q.mean(0).std(1).mean()).flatten()
    ratio = np.exp(new - old)
    clipped = np.clip(ratio, 1 - args.clip_epsilon, 1 + args.clip_epsilon)
    own = successes.obs, successes.chunk, successes.valid, torch.randn(5, 4), torch.rand(5, 1)
    bc_loss = numpy_bc_losses(before[0], *doubles(*own)).mean()
    expected = -np.minimum(ratio * advantage, clipped * advantage).mean() + args.success_coef * bc_loss
    assert metrics["losses/actor_loss"].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert metrics["losses/bc_loss"].item() == pytest.approx(bc_loss, rel=1e-4)
    for i, rate in ((1, args.policy_tau), (2, args.chi2_tau if args.chi2_coef else 0.0)):
        for new, old, moved in zip(policy.parameters(), before[i].parameters(), actors[i].parameters(), strict=True):
            torch.testing.assert_close(moved, old + rate * (new - old))


def ogpo_bandit(steps=200, success_chunk=0.0, **settings):
    """Returns: the better mode's share after OGPO, metrics, and the three policies' parameters."""
    fixed = {"group_size": 8, "ppo_batch_size": 32, "sigma": 1.0, "clip_epsilon": 0.02, "policy_tau": 0.1}
    fixed |= {"num_critics": 2, "success_coef": 0.0, "conservative": False}
    args = ogpo.Args(**(fixed | settings))
    actors = ogpo.Actors(*(copy.deepcopy(bandit_clone()) for _ in range(3)))
    optimizer = torch.optim.Adam(actors.policy.parameters(), lr=1e-3, fused=True)
    batch = Batch(torch.zeros(128, 1), torch.zeros(128, 1), None, None, None, torch.ones(128, 1))
    successes = batch._replace(chunk=torch.full((128, 1), success_chunk))
    for _ in range(steps):
        metrics = ogpo.update_policy(actors, bandit_values, optimizer, batch, successes, args)
    parameters = [torch.nn.utils.parameters_to_vector(policy.parameters()) for policy in actors]
    return share_of_the_better_mode(actors.policy), metrics, parameters


@pytest.mark.parametrize("conservative", [False, True])
def test_ogpo_moves_the_mass_to_the_better_mode(conservative):
    share, metrics, (policy, old_policy, slow_policy) = ogpo_bandit(conservative=conservative)
    assert share > 0.9 and metrics["losses/group_q_std"] < 0.4  # 0.6 in the clone
    assert 0 < (old_policy - policy).abs().sum() < (slow_policy - policy).abs().sum()


def test_the_penalty_holds_the_policy_where_critics_disagree():
    assert ogpo_bandit(steps=60, chi2_coef=20.0)[0] < ogpo_bandit(steps=60)[0] - 0.1


def test_cloning_of_successes_counts_against_the_critics():
    assert ogpo_bandit(success_coef=5.0, success_chunk=-0.5)[0] < 0.1


@pytest.mark.parametrize(("n", "reduction", "variance"), [(1, "mean", 1), (8, "mean", 1 / 8), (8, "median", 0.168)])
def test_next_chunk_samples_average_the_td_target(n, reduction, variance):
    """The critic says 0, its target the chunk drawn, N(0, 1): the loss is the variance of what n become."""

    class Chunk(torch.nn.Linear):
        encode, reward_scale = torch.nn.Identity(), 1.0

        def __init__(self, sign):
            super().__init__(1, 1)
            self.sign = sign

        def forward(self, features, chunk):
            return self.sign * chunk.T + 0 * self.weight

    policy = types.SimpleNamespace(encode=lambda obs: obs, sample=lambda features: torch.randn(len(features), 1))
    zeros, critic = torch.zeros(4000), Chunk(0)
    batch = Batch(zeros[:, None], zeros[:, None], zeros, zeros[:, None], zeros, torch.ones(4000, 1))
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.0)
    args = ogpo.Args(next_samples=n, next_reduction=reduction, chunk_size=1, gamma=1.0)
    metrics = ogpo.update_critic(policy, critic, Chunk(1), optimizer, batch, args)
    assert metrics["losses/qf_loss"].item() == pytest.approx(variance, rel=0.1)


# Replay buffer
@pytest.mark.parametrize("terminated", [True, False])
def test_td_target_and_windows_on_a_hand_made_episode(terminated):
    """Window 0 ends inside the episode, window 1 at its end, windows 2 and 3 are padded."""
    buffer = make_buffer(10, 1, 1, chunk_size=3)
    steps = np.arange(5.0)[:, None], np.arange(1.0, 5)[:, None] / 10, np.array([1.0, 2.0, 4.0, 8.0])
    buffer.add(Trajectory(*steps, terminated, 0.0))
    drawn = buffer.sample(200)
    starts = drawn.obs[:, 0].tolist()
    assert set(starts) == {0, 1, 2, 3}
    batch = Batch(*(column[[starts.index(i) for i in range(4)]] for column in drawn))
    target = poco.td_target(batch.reward, 100 + batch.next_obs[:, 0], batch.terminated, 0.9, 3)
    inside, beyond = 1 + 0.9 * 2 + 0.81 * 4 + 0.729 * 103, 0 if terminated else 0.729 * 104
    assert target[:2].tolist() == pytest.approx([inside, 2 + 0.9 * 4 + 0.81 * 8 + beyond], rel=1e-6)
    assert batch.terminated.tolist() == [0, terminated, terminated, terminated]
    assert batch.valid.tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert batch.chunk[2, :2].tolist() == pytest.approx([0.3, 0.4])
    assert len(drawn.chunk[drawn.obs[:, 0] == 2][:, 2].unique()) > 2  # never executed: from other windows
    assert batch.reward[2].item() == pytest.approx(4 + 0.9 * 8, rel=1e-6) and batch.next_obs[2].item() == 4


def numbered_episode(episode, n):
    """A step carries its episode and place."""
    obs = np.stack([np.full(n + 1, episode), np.arange(n + 1)], axis=1).astype(float)
    actions = (episode * 100.0 + np.arange(n))[:, None]
    return Trajectory(obs, actions, np.ones(n), episode % 2 == 0, 0.0)


@pytest.mark.parametrize("capacity", [1000, 37, 5])
def test_buffer_never_mixes_episodes(capacity):
    """Windows are runs of one episode, of the newest rows."""
    rng = np.random.default_rng(0)
    buffer, written, lengths = make_buffer(capacity, 2, 1, chunk_size=4), [], []
    for episode in range(60):
        n = int(rng.integers(1, 12))
        buffer.add(numbered_episode(episode, n))
        written, lengths, seen = written + [(episode, step) for step in range(n + 1)], [*lengths, n], set()
        for obs, chunk, _, next_obs, terminated, valid in zip(*buffer.sample(300), strict=True):
            e, step = obs.int().tolist()
            k = min(4, lengths[e] - step)
            assert valid.tolist() == [1] * k + [0] * (4 - k)
            assert chunk.tolist()[:k] == [e * 100 + step + i for i in range(k)]
            assert next_obs.tolist() == [e, step + k]
            assert terminated == (e % 2 == 0 and step + k == lengths[e])
            seen.add((e, step))
        rows = set(written[-capacity:])
        assert seen <= rows
        assert len(buffer) == sum(step < lengths[e] for e, step in rows)


def test_every_step_is_drawn_as_often():
    buffer = make_buffer(100, 2, 1, chunk_size=3)
    for episode, n in enumerate((1, 5, 2)):
        buffer.add(numbered_episode(episode, n))
    steps = (buffer.sample(16_000).obs @ torch.tensor([100.0, 1.0])).int().tolist()
    counts = [steps.count(step) for step in (0, 100, 101, 102, 103, 104, 200, 201)]
    assert sum(counts) == 16_000 and max(counts) < 2200 and min(counts) > 1800


def test_an_observation_is_kept_once_in_its_own_type():
    buffer = make_buffer(100, 5, 1, chunk_size=3, dtype=np.uint8)
    pictures = np.random.default_rng(0).integers(0, 256, (9, 5), dtype=np.uint8)
    buffer.add(Trajectory(pictures, np.zeros((8, 1)), np.zeros(8), False, 0.0))
    assert buffer.obs.dtype == torch.uint8 and buffer.size == 9 and len(buffer) == 8
    assert np.array_equal(buffer.obs[:9], pictures)
    assert buffer.sample(4).next_obs.dtype == torch.uint8


def test_a_full_buffer_does_not_load_into_a_larger_one():
    buffer = make_buffer(5, 2, 1, chunk_size=4)
    buffer.add(numbered_episode(0, 7))
    make_buffer(5, 2, 1, chunk_size=4).load_state_dict(buffer.state_dict())
    with pytest.raises(poco.UserError, match="full buffers cannot grow"):
        make_buffer(6, 2, 1, chunk_size=4).load_state_dict(buffer.state_dict())


# Environments
class Counting(gym.Env):
    """Counts its steps. Episodes of even length terminate, odd ones hit a limit; length 5 is a success."""

    observation_space = gym.spaces.Dict({"count": Box(-np.inf, np.inf, (1,)), "goal": Box(-1, 1, (2,))})
    action_space = Box(np.array([[0.0], [-4.0]]), np.array([[10.0], [4.0]]), (2, 1), np.float64)

    def __init__(self, render_mode=None, fault=None, factor=1.0):
        self.fault, self.factor, self.steps = fault, factor, 0
        if fault == "no bounds":
            self.action_space = Box(-np.inf, np.inf, (1,))
        if fault == "one value":
            self.action_space = Box(np.float32([0, 1]), np.float32([1, 1]))
        if fault == "rounding":
            self.action_space = Box(np.float32([[0.1], [5.0]]), np.float32([[123.4], [7.3]]), (2, 1))
        if fault == "sequence":
            self.observation_space = gym.spaces.Sequence(Box(0, 1, (1,)))

    def obs(self):
        poisoned = (self.fault == "NaN" and self.steps > 30) or self.fault == "NaN at reset"
        count = np.nan if poisoned else self.t
        return {"count": np.array([count], np.float32), "goal": np.zeros(2, np.float32)}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if self.fault == "raises in reset":
            raise ConnectionError("the robot does not answer")
        self.t, self.end = 0, int(self.np_random.integers(3, 9))
        return self.obs(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t, self.steps = self.t + 1, self.steps + 1
        if self.fault == "raises" and self.t == 2 and self.end == 8:
            raise ConnectionError("the robot does not answer")
        over = self.t >= self.end and self.fault != "endless"
        reward, even = self.factor * float(action[0, 0]), self.end % 2 == 0
        infos = {
            "only success": {"success": True} if over and self.end == 5 else {},  # some say it only then
            "passing": {"success": self.t == 2},
            "silent": {},
        }
        info = infos.get(self.fault, {"is_success": float(self.end == 5)})
        return self.obs(), reward, over and even, over and not even, info


class Point(gym.Env):
    """Moves a point to a goal; solved while nearer than 0.1."""

    observation_space, action_space = Box(-np.inf, np.inf, (2,), np.float64), Box(-1, 1, (1,))

    def __init__(self, render_mode=None):
        pass

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.goal = 0.0, float(self.np_random.uniform(-1, 1))
        return np.array([self.x, self.goal]), {}

    def step(self, action):
        self.x += 0.2 * float(action[0])
        solved = abs(self.x - self.goal) < 0.1
        return np.array([self.x, self.goal]), solved - 1.0, False, False, {"success": solved}


FAULTS = ("NaN", "NaN at reset", "raises", "raises in reset", "endless", "no bounds", "rounding", "sequence")
FAULTS += ("only success", "passing", "silent", "one value")
FAMILIES = ["FetchReach-v4", "AdroitHandDoor-v1", "FrankaKitchen-v1", "HandReach-v3", "PointMaze_UMaze-v3"]
FAMILIES += ["AntMaze_UMaze-v5", "HandManipulateBlock-v1", "Pendulum-v1"]
gym.register("Counting-v0", lambda: Counting())  # without arguments
gym.register("Point-v0", Point, max_episode_steps=20)
for factor in (0.01, 100, 1024):
    gym.register(f"Times{factor}-v0", Counting, kwargs={"factor": factor})
for fault in FAULTS:
    gym.register(f"{fault.title().replace(' ', '')}-v0", Counting, kwargs={"fault": fault})


def environments(env_id, num_envs=3, first_seed=0, **settings):
    return poco.Environments(Args(env_id=env_id, chunk_size=2, **settings), first_seed, num_envs)


def episodes_of(env_id, action=0.0, n=20, **settings):
    """The episodes of the seeds 0 to n - 1, in which every action is the same."""
    envs, episodes = environments(env_id, **settings), {}
    while len(episodes) < n:
        if envs.waiting():
            envs.set_chunks(torch.full((len(envs.waiting()), 2 * envs.action_dim), action))
        episodes |= {episode.seed: episode for episode in envs.step() if episode.seed < n}
    envs.close()
    return [episodes[seed] for seed in range(n)]


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_no_step_is_a_reset_and_a_chunk_starts_with_every_episode(chunk_size):
    envs, episodes, steps = environments("Counting-v0"), [], 0
    chunk = torch.arange(chunk_size).repeat_interleave(2) / 10  # an action tells its place
    while len(episodes) < 40:
        if envs.waiting():
            obs = envs.observations()
            assert all(count % chunk_size == 0 for count in obs[:, 0])
            envs.set_chunks(chunk.repeat(len(obs), 1))
        episodes, steps = episodes + envs.step(), steps + 3
    for episode in episodes:
        n = len(episode.actions)
        assert episode.obs[:, 0].tolist() == list(range(n + 1))  # the last is the end's, not the next one's
        np.testing.assert_allclose(episode.actions[:, 0], np.arange(n) % chunk_size / 10, rtol=1e-6)
        np.testing.assert_allclose(episode.rewards, 5 + 5 * episode.actions[:, 0], rtol=1e-6)
        assert episode.terminated == (n % 2 == 0) and episode.success == (n == 5)
    assert len({episode.seed for episode in episodes}) == len(episodes)
    unfinished = envs.close()
    assert not any(episode.terminated for episode in unfinished)
    assert sum(len(episode.actions) for episode in episodes + unfinished) == steps


def test_an_episode_is_that_of_its_seed():
    env = Counting()
    for episode in episodes_of("Counting-v0"):
        env.reset(seed=episode.seed)
        assert env.end == len(episode.actions)


def test_evaluation_counts_every_seed_once(capsys):
    args = Args(env_id="Counting-v0", chunk_size=2, num_envs=3, hidden_dim=16, eval_episodes=20)
    networks = poco.make_networks(args, space(3), 2)
    n = [len(episode.actions) for episode in episodes_of("Counting-v0")].count(5)
    metrics = poco.evaluate(*networks, args, 3, Path("step 5"))
    assert metrics["eval/success"] == n / 20
    assert f"step 5, best of 3: success {n / 20:.2f}, mean return" in capsys.readouterr().out


def test_the_best_of_n_is_what_the_critics_prefer():
    args = Args(chunk_size=2, hidden_dim=16)
    policy, _ = poco.make_networks(args, space(3), 2)

    def critic(features, chunk):
        return chunk.T[:1]

    critic.encode = torch.nn.Identity()
    torch.manual_seed(3)
    candidates = policy.sample(torch.zeros(48, 3)).view(6, 8, 4)
    torch.manual_seed(3)
    chosen = poco.choose_chunks(policy, critic, torch.zeros(6, 3), 8)
    expected = [group[group[:, 0].argmax()].tolist() for group in candidates]
    np.testing.assert_allclose(chosen, expected, rtol=1e-5)


@pytest.mark.parametrize(("action", "reward"), [(-1.0, 0.0), (0.0, 5.0), (1.0, 10.0)])
def test_actions_cover_the_environment_s_box(action, reward):
    assert episodes_of("Counting-v0", action, 1)[0].rewards == pytest.approx(reward)


def test_rounding_does_not_leave_the_box():
    low, high = (episodes_of("Rounding-v0", action, 1)[0] for action in (-1.0, 1.0))  # contains() would raise
    assert low.rewards[0] == pytest.approx(0.1, abs=1e-4) and high.rewards[0] == pytest.approx(123.4)


@pytest.mark.parametrize(("success_at", "expected"), [("end", 0.0), ("any", 1.0)])
def test_success_of_the_last_step_or_of_any(success_at, expected):
    assert {episode.success for episode in episodes_of("Passing-v0", success_at=success_at)} == {expected}


def test_where_only_success_is_reported_the_others_failed():
    episodes = episodes_of("OnlySuccess-v0")
    n = [len(episode.actions) for episode in episodes].count(5)
    assert poco.mean_success(episodes) == n / 20
    assert np.isnan(poco.mean_success(episodes_of("Silent-v0", n=3)))


def test_an_environment_without_a_limit_is_cut_off(monkeypatch):
    honest = gym.wrappers.TimeLimit
    monkeypatch.setattr(poco.gym.wrappers, "TimeLimit", lambda env, limit: honest(env, limit // 1000))
    (episode,) = episodes_of("Endless-v0", n=1)
    assert len(episode.actions) == 10 and not episode.terminated


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", FAMILIES)
def test_environment_families_report_success_or_not(env_id):
    env = poco.Environment(Args(env_id=env_id))
    env.reset(0)
    env.chunk = [np.zeros(env.box.shape, np.float32).flatten()]
    assert env.obs[0].ndim == 1 and env.step() is None
    success = env.episode(terminated=False).success
    assert np.isnan(success) == (env_id in ("Pendulum-v1", "FrankaKitchen-v1")) and success != 1


# Whole runs
def as_typed(**options):
    typed = []
    for name, value in options.items():
        option = name.replace("_", "-")
        typed += [f"--{'no-' * (not value)}{option}"] if isinstance(value, bool) else [f"--{option}", value]
    return typed


def main(script, monkeypatch, *typed, **options):
    """What the command line does, in this process. Returns: the exit status."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, [*typed, *as_typed(**options)])])
    try:
        return script.main() or 0
    except SystemExit as exit_:
        return exit_.code


RUN = {"env_id": "Counting-v0", "dataset": "none", "chunk_size": 2, "hidden_dim": 16, "batch_size": 32}
RUN |= {"num_envs": 3, "eval_episodes": 5, "critic_warmup": 60, "total_timesteps": 300}
RUN |= {"eval_interval": 150, "log_interval": 60}


def small_run(script, cwd, monkeypatch, **settings):
    """Returns: the exit status and the folder of a run in an empty folder."""
    cwd.mkdir(exist_ok=True)
    monkeypatch.chdir(cwd)
    if script is ogpo:
        settings = {"policy_start": 120} | settings
    return main(script, monkeypatch, **(RUN | settings)), *(cwd / "runs").iterdir()


def rows_of(folder):
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def states_of(folder):
    content = torch.load(folder / "policy.pt", weights_only=True)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["ranks"][0]
    return state | {"policy.pt": content["policy"], "critic.pt": content["critic"]}


def write_demos(path, n=24, seed=0, gains=(5.0,), noise=0.3):
    """Demonstrations of Point-v0, a row a step. Returns: the file's name, as --dataset takes it."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        x, goal = 0.0, rng.uniform(-1, 1)
        for t in range(20):
            action = np.clip(gains[i % len(gains)] * (goal - x) + noise * rng.normal(), -1, 1)
            after = x + 0.2 * action
            solved = abs(after - goal) < 0.1
            rows.append(([x, goal], [action], solved - 1.0, 0, t == 19, [after, goal], solved))
            x = after
    keys = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations", "success")
    columns = zip(*rows, strict=True)
    np.savez(path, **{key: np.array(column, float) for key, column in zip(keys, columns, strict=True)})
    return str(path)


@both_scripts
def test_a_run_writes_its_files_and_rows(script, tmp_path, monkeypatch, capsys):
    _, folder = small_run(script, tmp_path, monkeypatch)
    rows = rows_of(folder)
    assert [int(row["global_step"]) for row in rows] == [0, 60, 120, 150, 180, 240, 300]
    assert [row["eval/success"] != "" for row in rows] == [step in (0, 3, 6) for step in range(7)]
    assert rows[2]["losses/qf_loss"] and not rows[2]["losses/actor_loss"] and rows[4]["losses/actor_loss"]
    assert states_of(folder)["policy"]["encode.mean"][0] > 0.5  # statistics of what it met
    assert re.fullmatch(rf"Counting-v0__{script.METHOD}__1__[\d-]+", folder.name)
    assert sorted(path.stem for path in folder.iterdir()) == ["checkpoint", "clone", "metrics", "policy"]
    out = capsys.readouterr().out
    for option in (f"--resume runs/{folder.name}", f"--evaluate runs/{folder.name}/policy.pt"):
        assert f"python {script.METHOD}.py {option}\n" in out


@both_scripts
def test_a_policy_file_evaluates_as_in_its_run_and_what_is_typed_counts(script, tmp_path, monkeypatch, capsys):
    _, folder = small_run(script, tmp_path, monkeypatch)
    results = re.findall(r"step 300, best of 1: (success .*)", capsys.readouterr().out)
    assert main(script, monkeypatch, "--evaluate", folder / "policy.pt") == 0
    assert f": {results[-1]}\n" in capsys.readouterr().out
    assert main(script, monkeypatch, "--evaluate", folder / "policy.pt", "--eval-episodes", 3) == 0
    assert "3 episodes" in capsys.readouterr().out


@both_scripts
def test_logging_changes_nothing_and_a_run_is_the_same_again(script, tmp_path, monkeypatch):
    _, folder = small_run(script, tmp_path / "first", monkeypatch)
    _, other = small_run(script, tmp_path / "second", monkeypatch, log_interval=37)
    assert same(states_of(folder), states_of(other))


@pytest.mark.parametrize(("factor", "tolerance"), [(1024, 0), (100, 1e-3), (0.01, 1e-3)])
def test_a_run_is_the_same_at_any_scale_of_rewards(factor, tolerance, tmp_path, monkeypatch):
    _, folder = small_run(poco, tmp_path / "one", monkeypatch)
    _, scaled = small_run(poco, tmp_path / "scaled", monkeypatch, env_id=f"Times{factor}-v0")
    states = [states_of(run)["policy.pt"].values() for run in (folder, scaled)]
    for a, b in zip(*states, strict=True):
        assert (a - b).abs().max() <= tolerance  # rounding, unless a power of two
    returns = [float(rows_of(run)[-1]["charts/episodic_return"]) for run in (folder, scaled)]
    assert returns[1] == pytest.approx(factor * returns[0], rel=1e-4)


@both_scripts
def test_no_step_of_experience_is_lost(script, tmp_path, monkeypatch):
    settings = {"env_id": "Point-v0", "num_envs": 4, "eval_interval": 28, "total_timesteps": 168, "eval_episodes": 1}
    _, folder = small_run(script, tmp_path, monkeypatch, **settings)
    at_evaluations = [row for row in rows_of(folder) if row["eval/success"]]
    assert len(at_evaluations) == 7  # after 7 steps of episodes of 20
    assert all(row["charts/buffer_size"] == row["global_step"] for row in at_evaluations)
    _, _, _, left = states_of(folder)["buffer"]["steps"].split([1, 1, 1, 1], dim=1)
    assert left.max() == 7


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


@pytest.mark.parametrize(("script", "every"), [(poco, 1), (ogpo, 3)], ids=SCRIPTS)
def test_a_run_killed_in_any_write_and_resumed_ends_as_undisturbed(script, every, tmp_path, monkeypatch):
    writes, last = [], 10**9

    def interrupted(honest, half):
        def write(*given):
            writes.append(None)
            if len(writes) > last:
                half(*given)
                raise Killed
            return honest(*given)

        return write

    half_file = interrupted(script.save_file, lambda path, *_: path.with_suffix(".tmp").write_bytes(b"PK"))
    half_row = interrupted(script.Run.write_row, lambda run, _: (run.folder / "metrics.csv").write_text("global_s"))
    monkeypatch.setattr(script, "save_file", half_file)
    monkeypatch.setattr(script.Run, "write_row", half_row)
    settings = {"env_id": "Point-v0", "dataset": write_demos(tmp_path / "demos.npz", 5), "bc_steps": 5}
    settings |= {"hidden_dim": 8, "batch_size": 16, "total_timesteps": 120, "eval_interval": 60}
    settings |= {"critic_warmup": 10, "eval_episodes": 2}
    _, whole = small_run(script, tmp_path / "whole", monkeypatch, **settings)
    assert len(writes) > 10
    for kill in range(1, len(writes), every):
        writes, last = [], kill
        with pytest.raises(Killed):
            small_run(script, tmp_path / str(kill), monkeypatch, **settings)
        (folder,), last = (tmp_path / str(kill) / "runs").iterdir(), 10**9
        assert main(script, monkeypatch, "--resume", folder) == 0
        assert rows_of(folder) == rows_of(whole) and same(states_of(folder), states_of(whole))


def test_what_is_typed_beside_resume_counts(tmp_path, monkeypatch, capsys):
    _, folder = small_run(poco, tmp_path, monkeypatch)
    rows, resume, typed = rows_of(folder), ("--resume", folder), {"gamma": 0.5, "learning_rate": 0.01}
    assert main(poco, monkeypatch, *resume, "--hidden-dim", 32) == 2
    assert "does not fit these arguments" in capsys.readouterr().err and rows_of(folder) == rows
    assert main(poco, monkeypatch, *resume, **typed, total_timesteps=360) == 0
    assert rows_of(folder)[: len(rows)] == rows and rows_of(folder)[-1]["global_step"] == "360"
    args, _ = poco.read_file(folder / "checkpoint.pt")
    assert vars(args).items() >= (typed | {"batch_size": 32}).items()
    assert states_of(folder)["critic_optimizer"]["param_groups"][0]["lr"] == 0.01


@pytest.mark.parametrize(("script", "ranks"), [(poco, 2), (ogpo, 1)])
def test_a_run_is_resumed_by_its_own_script_and_processes(script, ranks, tmp_path, monkeypatch):
    _, folder = small_run(poco, tmp_path, monkeypatch, total_timesteps=60)
    monkeypatch.setattr(script, "NUM_RANKS", ranks)
    with pytest.raises(script.UserError, match=f"goes on by python poco.* {folder}"):
        script.Run(Args(resume=folder), {}).load_checkpoint()


def test_a_lost_checkpoint_is_refused_and_the_folder_untouched(tmp_path, monkeypatch, capsys):
    _, folder = small_run(poco, tmp_path, monkeypatch, total_timesteps=60)
    (folder / "checkpoint.pt").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(poco, monkeypatch, "--resume", folder) == 2
    assert "checkpoint.pt" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@both_scripts
def test_half_of_a_batch_are_demonstrations_and_none_in_ogpo(script, tmp_path, monkeypatch):
    shares, demo = [], Trajectory(np.full((5, 3), 0.5), np.zeros((4, 2)), np.zeros(4), True, 1.0)

    def record(policy, critic, target_critic, optimizer, batch, args):
        shares.append((batch.obs[:, 1] == 0.5).float().mean().item())  # online it is 0
        return {}

    monkeypatch.setattr(script, "load_demonstrations", lambda args, envs: [demo] * 10)
    monkeypatch.setattr(script, "update_critic", record)
    small_run(script, tmp_path, monkeypatch, dataset="demos", bc_steps=1)
    assert set(shares[:60]) == {1.0}  # offline
    assert set(shares[70:]) == ({0.5} if script is poco else {0.0})


@both_scripts
def test_a_run_begins_with_the_other_script_s_policy(script, tmp_path, monkeypatch, capsys):
    settings = {"env_id": "Point-v0", "dataset": write_demos(tmp_path / "demos.npz"), "bc_steps": 10}
    other = poco if script is ogpo else ogpo
    _, folder = small_run(other, tmp_path / "clone", monkeypatch, total_timesteps=60, **settings)
    clone, typed = folder / "clone.pt", {"critic_warmup": 0, "utd_ratio": 0, "best_of_n": 2}
    monkeypatch.chdir(tmp_path)
    assert main(script, monkeypatch, "--policy", clone, "--hidden-dim", 8) == 2
    assert "does not fit" in capsys.readouterr().err and not (tmp_path / "runs").exists()
    assert main(script, monkeypatch, "--policy", clone, **typed) == 0  # the rest comes from the file
    (begun,) = (tmp_path / "runs").iterdir()
    files = [torch.load(path, weights_only=True) for path in (clone, begun / "clone.pt", begun / "policy.pt")]
    assert all(same(files[0][name], file[name]) for name in ("policy", "critic") for file in files[1:])
    args, *_ = script.load_policy(begun / "policy.pt")
    assert (args.hidden_dim, args.chunk_size, args.best_of_n) == (16, 2, 2)


@both_scripts
@pytest.mark.parametrize("where", ["critic_loss", "bc_loss"])
def test_a_nan_loss_stops_the_run_and_never_reaches_a_weight(script, where, tmp_path, monkeypatch, capsys):
    owner, calls = script if where == "critic_loss" else script.FlowPolicy, []

    def poisoned(*args, honest=getattr(owner, where)):
        calls.append(None)
        return honest(*args) * (torch.nan if len(calls) == 20 else 1.0)

    def save(run, step, critic_updates):  # without a check
        run.save_checkpoint(step, critic_updates)

    monkeypatch.setattr(owner, where, poisoned)
    monkeypatch.setattr(script.Run, "evaluate_and_save", save)
    settings = {"env_id": "Point-v0", "dataset": write_demos(tmp_path / "demos.npz"), "bc_steps": 30}
    status, folder = small_run(script, tmp_path / "run", monkeypatch, **settings)
    assert status == 2 and re.search(r"losses/\w+ became NaN", capsys.readouterr().err)
    for name, part in torch.load(folder / "checkpoint.pt", weights_only=True)["ranks"][0].items():
        assert "buffer" in name or "optimizer" in name or all(torch.isfinite(x).all() for x in part.values())


@both_scripts
def test_a_poor_clone_improves(script, tmp_path, monkeypatch):
    """Of demonstrations half of which stay where they are."""
    dataset = write_demos(tmp_path / "demos.npz", gains=(5.0, 0.0))
    settings = {"dataset": dataset, "bc_steps": 300, "hidden_dim": 32}
    settings |= {"env_id": "Point-v0", "batch_size": 64, "num_envs": 4, "critic_warmup": 150}
    settings |= {"total_timesteps": 1600, "eval_interval": 1600, "utd_ratio": 0.25, "eval_episodes": 50}
    _, folder = small_run(script, tmp_path / "run", monkeypatch, **settings)
    clone, tuned = (float(row["eval/return"]) for row in rows_of(folder) if row["eval/return"])
    assert clone < -16 and tuned > clone + 0.8  # of steps away from the goal


def test_the_progress_bar_shows_success(tmp_path, monkeypatch, capsys):
    small_run(poco, tmp_path, monkeypatch)
    assert re.search(r"300/300 \[.*, success=\d\.\d\d\]", capsys.readouterr().err)


# Other policies
class Diffusion(torch.nn.Module):
    """A small DDPM over chunks. All that POCO asks of a policy is encode, bc_loss and sample."""

    def __init__(self, obs_dim, chunk_dim, levels=8):
        super().__init__()
        self.encode = poco.Normalizer(obs_dim)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(obs_dim + chunk_dim + 1, 64), torch.nn.SiLU(), torch.nn.Linear(64, chunk_dim)
        )
        self.register_buffer("kept", torch.cumprod(1 - torch.linspace(0.02, 0.6, levels), dim=0))
        self.chunk_dim, self.levels = chunk_dim, levels

    def noise_of(self, features, x, level):
        return self.net(torch.cat([features, x, level / self.levels], dim=1))

    def bc_loss(self, features, chunk, valid=None):
        level = torch.randint(self.levels, (len(chunk), 1))
        noise, kept = torch.randn_like(chunk), self.kept[level]
        x = kept.sqrt() * chunk + (1 - kept).sqrt() * noise
        return ((self.noise_of(features, x, level) - noise) ** 2).mean(1)

    def sample(self, features, flow_steps=None):
        x = torch.randn(len(features), self.chunk_dim)
        for level in reversed(range(self.levels)):
            kept = self.kept[level]
            before = self.kept[level - 1] if level else torch.ones(())
            noise = self.noise_of(features, x, torch.full_like(x[:, :1], level))
            chunk = ((x - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-1, 1)
            x = before.sqrt() * chunk + (1 - before).sqrt() * noise
        return chunk


class Frozen(FlowPolicy):
    """A flow on the features of a backbone that is not trained, with its statistics before it."""

    def __init__(self, obs_dim, chunk_dim):
        super().__init__(8, chunk_dim, hidden_dim=32)
        backbone = torch.nn.Linear(obs_dim, 8).requires_grad_(False)
        self.encode = torch.nn.Sequential(poco.Normalizer(obs_dim), backbone, torch.nn.Tanh())


@pytest.mark.parametrize("kind", [Diffusion, Frozen])
def test_train_takes_other_networks(kind, tmp_path, monkeypatch):
    policies = []

    def make_networks(args, obs_space, action_dim):
        chunk_dim = args.chunk_size * action_dim
        policies.append(kind(obs_space.shape[0], chunk_dim))
        return policies[-1], CriticEnsemble(obs_space.shape[0], chunk_dim, args.num_critics, args.hidden_dim)

    monkeypatch.chdir(tmp_path)
    settings = {"env_id": "Point-v0", "dataset": write_demos("demos.npz"), "bc_steps": 500}
    args = Args(**(RUN | settings | {"eval_episodes": 50, "total_timesteps": 150}))
    poco.train(args, make_networks)
    (folder,) = (tmp_path / "runs").iterdir()
    clone, tuned = (float(row["eval/success"]) for row in rows_of(folder) if row["eval/success"])
    assert clone > 0.4 and tuned > 0.4  # chance is 10 %
    _, policy, _ = poco.load_policy(folder / "policy.pt", make_networks=make_networks)
    assert same(policy.state_dict(), policies[0].state_dict())
    if kind is Frozen:
        initial = torch.load(folder / "clone.pt", weights_only=True)["policy"]
        assert torch.equal(initial["encode.1.weight"], policy.encode[1].weight)


def test_updates_take_several_groups_of_parameters():
    policy, critic, batch = FlowPolicy(3, 4), CriticEnsemble(3, 4, 2), random_batch(16, 3, 2, 2)
    first, *others = policy.net
    groups = [{"params": first.parameters(), "lr": 0.1}, {"params": torch.nn.Sequential(*others).parameters()}]
    before = copy.deepcopy(policy.net)
    args = Args(num_candidates=2, posterior_batch_size=4, chunk_size=2)
    poco.update_policy(policy, critic, torch.optim.AdamW(groups, lr=1e-3), batch, args)
    moved = [(old - new).abs().max() for old, new in zip(before.parameters(), policy.parameters(), strict=True)]
    assert moved[0] > 0.05 and 0 < moved[-1] < 2e-3


# The command line, as a user types it
FAULTY = {
    "Nan-v0": "an observation, action or reward is NaN", "NanAtReset-v0": "is NaN",
    "Raises-v0": "Raises-v0 failed in step: the robot does not answer",
    "RaisesInReset-v0": "failed in reset: the robot", "OneValue-v0": "an action has low == high",
    "NoBounds-v0": "cannot be used: ", "Sequence-v0": "cannot be used: ", "CartPole-v1": "Discrete",
    "Countin-v0": "Did you mean", "no_such:Own-v0": "no_such",
}  # fmt: skip
BAD_INPUT = {
    "--env-id FetchReach-v4 --chunk-size 51": "0 of 200 episodes", "--num-demos 201": "201 are needed",
    "--env-id FetchPickAndPlac-v4": "Did you mean", "--effective-samples 1": "--effective-samples",
    "--env-id Pendulum-v1": "a Minari id or none", "ogpo --posterior-coef 1": "posterior-coef",
    f"--buffer-size {10**22}": "--buffer-size", "ogpo --policy-tau 2": "--policy-tau",
    "ogpo --success-coef -1": "--success-coef", "--tau 1.5": "--tau", "--eval-interval 0": "--eval-interval",
    "--dataset nowhere.npz": "nowhere.npz", "--evaluate nowhere.pt": "nowhere.pt", "--no-such 1": "no-such",
    "--num-candidates 1": "--num-candidates", "ogpo --group-size 1": "--group-size", "ogpo --sigma 0": "--sigma",
    "ogpo --next-reduction max": "median", "--temperature nan": "--temperature", "--num-envs 0": "--num-envs",
    "--gamma 1.5": "--gamma", "--policy nowhere.pt": "nowhere.pt", "--num-demos 0": "--num-demos",
    "--buffer-size 100": "--batch-size", "--temperature 0": "--temperature", "--batch-size 0": "--batch-size",
    "--num-envs -1": "--num-envs", "--resume nowhere": "nowhere", "--clip-threshold 0": "--clip-threshold",
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTY)
def test_a_faulty_environment_gets_a_sentence_and_status_2(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(poco, monkeypatch, **(RUN | {"env_id": case, "total_timesteps": 900})) == 2
    err = capsys.readouterr().err
    assert FAULTY[case] in err and "Traceback" not in err and re.search(r"(^|[\n\r])poco\.py: ", err)


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_a_sentence_and_status_2_and_leaves_nothing(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script = ogpo if case.startswith("ogpo") else poco
    assert main(script, monkeypatch, *case.removeprefix("ogpo ").split()) == 2
    err = capsys.readouterr().err
    assert BAD_INPUT[case] in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("typed", ["--tensorboard", "--track", "--dataset some/data-v0"])
def test_a_missing_optional_package_is_named(typed, tmp_path, monkeypatch, capsys):
    package = {"--tensorboard": "tensorboard", "--track": "wandb"}.get(typed, '"minari[hdf5]"')
    monkeypatch.setattr(poco.importlib.util, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    assert main(poco, monkeypatch, *as_typed(**RUN), *typed.split()) == 2
    assert f"pip install {package}" in capsys.readouterr().err


def start(*command, cwd, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=cwd, env=environment, **pipes, **options)


def test_a_fetch_task_runs_as_readme_says(tmp_path):
    typed = "--env-id FetchReach-v4 --num-demos 10 --bc-steps 100 --total-timesteps 400 --eval-interval 400"
    typed += " --critic-warmup 10 --utd-ratio 0.1 --eval-episodes 10 --hidden-dim 64"
    process = start(poco.__file__, *typed.split(), cwd=tmp_path)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert "demonstrations: 200 of 200 episodes last a chunk, 10 used, success 1.00" in out
    results = re.findall(r"step \d+, best of 1: (success .*)", out)
    (command,) = set(re.findall(r"python poco.py (--evaluate .*)", out))
    process = start(poco.__file__, *command.split(), cwd=tmp_path)
    again, err = process.communicate(timeout=240)
    assert process.returncode == 0 and len(results) == 2 and results[1] in again, err


@pytest.mark.parametrize(("script", "signal_"), [(poco, signal.SIGINT), (ogpo, signal.SIGTERM)], ids=SCRIPTS)
def test_ctrl_c_and_sigterm_exit_with_130_and_the_command_that_goes_on(script, signal_, tmp_path):
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
    settings = {"env_id": "test_poco:Counting-v0", "total_timesteps": 10**7, "eval_interval": 1500}
    process = start(script.__file__, *as_typed(**(RUN | settings)), cwd=tmp_path, preexec_fn=heed)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/policy.pt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal_)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    (folder,) = (tmp_path / "runs").iterdir()
    assert f"python {script.METHOD}.py --resume {folder.relative_to(tmp_path)}\n" in out
    assert script.load_policy(folder / "policy.pt")[0].env_id == "test_poco:Counting-v0"


def test_a_full_disk_ends_with_a_sentence_and_the_last_checkpoint(tmp_path):
    typed = "--env-id test_poco:Counting-v0 --dataset none --hidden-dim 16 --total-timesteps 3000"
    typed += " --eval-interval 1000 --eval-episodes 1 --utd-ratio 0.01"
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (80_000, 80_000))  # they grow
    process = start(poco.__file__, *typed.split(), cwd=tmp_path, preexec_fn=limit)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 2 and "too large" in err and "Traceback" not in err
    (folder,) = (tmp_path / "runs").iterdir()
    assert "--resume runs/" in out and 0 < poco.read_file(folder / "checkpoint.pt")[1]["step"] < 3000


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("code_was_run",))


def load_demos(args):
    envs = poco.Environments(args, 0, 1)
    envs.close()
    return poco.load_demonstrations(args, envs)


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "pickle"])
def test_damaged_data_gets_a_sentence(damage, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    whole = Path(write_demos("whole.npz")).read_bytes()
    damaged = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello", "pickle": pickle.dumps(Malicious())}
    Path("damaged.npz").write_bytes(damaged[damage])
    with pytest.raises(poco.UserError, match="damaged.npz"):
        load_demos(Args(env_id="Point-v0", dataset="damaged.npz"))
    assert not Path("code_was_run").exists()


@pytest.mark.parametrize("damage", ["cut", "empty", "malicious", "not a dictionary", "another environment"])
def test_a_damaged_policy_file_gets_a_sentence(damage, tmp_path, monkeypatch):
    _, folder = small_run(poco, tmp_path, monkeypatch, total_timesteps=60)
    whole, content = (folder / "policy.pt").read_bytes(), torch.load(folder / "policy.pt", weights_only=True)
    content = {
        "malicious": content | {"policy": Malicious()}, "not a dictionary": [1, 2],
        "another environment": content | {"args": content["args"] | {"env_id": "FetchReach-v4"}},
    }.get(damage)  # fmt: skip
    if content:
        torch.save(content, "damaged")
    else:
        Path("damaged").write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
    with pytest.raises(poco.UserError, match="damaged"):
        poco.load_policy(Path("damaged"))
    assert not Path("code_was_run").exists()


# Several processes
def gradients_of(script, rows):
    """Statistics, scale, gradient norm and gradients of one step on these rows of a batch of 64."""
    torch.manual_seed(0)
    obs, x = (torch.randn(64, d)[rows] for d in (3, 4))
    rewards = torch.linspace(0.0, 4.0, 64)[rows]
    policy, critic = script.FlowPolicy(3, 4), CriticEnsemble(3, 4, 2)
    buffer = make_buffer(200, 3, 4, 1)
    for o, reward in zip(obs, rewards, strict=True):  # both observations of a step are the same
        buffer.add(Trajectory(o.repeat(2, 1).numpy(), np.zeros((1, 4)), np.array([reward]), False, 0.0))
    script.fit_statistics({"policy": policy, "critic": critic, "target_critic": critic}, buffer)
    optimizer = torch.optim.Adam(policy.parameters(), fused=True)
    velocity = policy.velocity(policy.encode(obs), x, torch.zeros(len(obs), 1))
    norm = script.gradient_step(optimizer, velocity.square().mean())
    gradients = [parameter.grad for parameter in policy.parameters()]
    return [policy.encode.mean, policy.encode.std, critic.reward_scale, norm, *gradients]


def rank():
    """What each of two processes does: a whole run, then half of the batch's gradient."""
    script, networks = SCRIPTS[sys.argv.pop(1)], {}
    script.Run.record = lambda self, values: networks.update(self.learner)
    script.main()
    names = [name for name in networks if name == "critic" or name.endswith("policy")]
    states = {name: networks[name].state_dict() for name in names}
    gradients = gradients_of(script, slice(script.RANK * 32, script.RANK * 32 + 32))
    torch.save([states, gradients], f"rank{script.RANK}.pt")


def test_two_ranks_stay_equal_and_learn_from_both_batches(tmp_path, monkeypatch, capsys):
    (tmp_path / "rank.py").write_text("import test_poco\ntest_poco.rank()")
    command = "-m torch.distributed.run --standalone --nproc-per-node=2 rank.py ogpo".split()
    settings = RUN | {"env_id": "test_poco:Counting-v0", "policy_start": 120}
    process = start(*command, *as_typed(**settings), cwd=tmp_path)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    (first, gradients), (second, _) = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert len(first) == 4 and same(first, second)
    torch.testing.assert_close(gradients, gradients_of(ogpo, slice(64)))
    (folder,) = (tmp_path / "runs").iterdir()  # rank 1 writes nothing
    assert rows_of(folder)[-1]["global_step"] == "300" and "torchrun --nproc-per-node=2" in out
    assert main(ogpo, monkeypatch, "--resume", folder) == 2  # by one process alone
    assert "goes on by torchrun --nproc-per-node=2 ogpo.py --resume" in capsys.readouterr().err


# Speed without another meaning
def test_bfloat16_gives_nearly_the_same_update(monkeypatch):
    losses, args = {}, Args(chunk_size=2, num_candidates=4)
    for hardware in (False, True):
        monkeypatch.setattr(poco, "CPU_BF16", hardware)
        torch.manual_seed(0)
        policy, critic, batch = FlowPolicy(3, 4), CriticEnsemble(3, 4, 2), random_batch(64, 3, 2, 2)
        adam = [torch.optim.Adam(network.parameters(), fused=True) for network in (policy, critic)]
        losses[hardware] = poco.update_critic(policy, critic, copy.deepcopy(critic), adam[1], batch, args)
        losses[hardware] |= poco.update_policy(policy, critic, adam[0], batch, args)
        assert all(weight.dtype == weight.grad.dtype == torch.float32 for weight in policy.parameters())
    assert any(losses[True][name] != losses[False][name] for name in losses[True])
    for name in ("losses/qf_loss", "losses/actor_loss", "losses/actor_grad_norm", "losses/effective_samples"):
        assert losses[True][name].item() == pytest.approx(losses[False][name].item(), rel=0.05)


def test_compiled_updates_are_the_same(tmp_path, monkeypatch):
    traced = functools.partial(torch.compile, backend="eager")  # traced, but no compiler is needed
    monkeypatch.setattr(torch, "compile", lambda f, mode, disable: traced(f, disable=disable))
    settings = {"hidden_dim": 8, "total_timesteps": 180, "eval_interval": 90}
    _, eager = small_run(ogpo, tmp_path / "eager", monkeypatch, **settings)
    _, compiled = small_run(ogpo, tmp_path / "compiled", monkeypatch, compile=True, **settings)
    a, b = rows_of(eager)[-1], rows_of(compiled)[-1]
    assert all(a[name] == b[name] or float(b[name]) == pytest.approx(float(a[name]), rel=1e-3) for name in a)


def test_recorded_metrics_do_not_change_when_a_cuda_graph_writes_over_them():
    run, value = poco.Run(Args(), {"buffer": []}), torch.ones(())
    for result in (1.0, 2.0, 6.0):
        value.fill_(result)  # what a replay does
        run.record({"losses/qf_loss": value})
    assert run.sums["losses/qf_loss"] / run.counts["losses/qf_loss"] == 3


# Data
@pytest.fixture
def recorded(tmp_path):
    """The arguments for six episodes of Counting in a file, those episodes, and the file's columns."""
    episodes, columns = [], {}
    rng = np.random.default_rng(0)
    for seed, n in enumerate((4, 5, 6, 5, 4, 7)):
        obs = np.stack([np.arange(n + 1.0), np.full(n + 1, seed), np.zeros(n + 1)], axis=1)
        ends = np.arange(n) == n - 1
        steps = obs, rng.uniform(-1, 1, (n, 2)), rng.normal(size=n)
        episodes.append(Trajectory(*steps, n % 2 == 0, float(n == 5)))
        rows = {"observations": obs[:-1], "next_observations": obs[1:], "rewards": steps[2]}
        rows |= {"terminals": ends & (n % 2 == 0), "timeouts": ends & (n % 2 == 1), "success": ends * (n == 5)}
        rows["actions"] = np.array([0, -4]) + (steps[1] + 1) / 2 * np.array([10, 8])  # in their own range
        for key, column in rows.items():
            columns.setdefault(key, []).append(column)
    data = {key: np.concatenate(parts).astype(np.float64) for key, parts in columns.items()}
    args = Args(env_id="Counting-v0", chunk_size=2, dataset=str(tmp_path / "data.npz"))
    np.savez(args.dataset, **data)
    return args, episodes, data


def assert_same_episodes(a, b):
    for x, y in zip(a, b, strict=True):
        for name in ("obs", "actions", "rewards", "terminated", "success"):
            np.testing.assert_allclose(getattr(x, name), getattr(y, name), atol=1e-6)


def test_a_file_gives_the_episodes_in_it(recorded):
    args, episodes, _ = recorded
    assert_same_episodes(load_demos(args), episodes)


def test_without_next_observations_the_row_at_a_cut_only_shows_the_end(recorded):
    args, episodes, data = recorded
    del data["next_observations"]
    data["terminals"][-1] = data["timeouts"][-1] = 0  # the last episode is unfinished
    np.savez(args.dataset, **data)
    for episode, whole in zip(load_demos(args), episodes, strict=True):
        n = len(whole.actions) - (not whole.terminated)
        assert len(episode.actions) == n and len(episode.obs) == n + 1
        np.testing.assert_allclose(episode.obs[:n], whole.obs[:n], atol=1e-6)


@pytest.mark.parametrize(("success_at", "expected"), [("end", [0] * 6), ("any", [1] + [0] * 5)])
def test_success_of_a_file_s_episodes(success_at, expected, recorded):
    args, _, data = recorded
    data["success"] = np.arange(len(data["rewards"])) == 0
    np.savez(args.dataset, **data)
    demos = load_demos(poco.replace(args, success_at=success_at))
    assert [episode.success for episode in demos] == expected


def test_episodes_shorter_than_a_chunk_are_left_out(recorded, capsys):
    args, _, _ = recorded
    assert len(load_demos(poco.replace(args, chunk_size=6))) == 2
    assert "2 of 6 episodes last a chunk" in capsys.readouterr().out


def test_num_demos_are_drawn_by_the_seed(recorded):
    args, episodes, _ = recorded
    drawn = {}
    for seed in range(30):
        demos = load_demos(poco.replace(args, num_demos=2, seed=seed))
        drawn[seed] = tuple(int(demo.obs[0, 1]) for demo in demos)
        assert_same_episodes(demos, [episodes[i] for i in drawn[seed]])
    assert len(set(drawn.values())) > 8 and set(sum(drawn.values(), ())) == set(range(6))


def test_processes_share_the_demonstrations(recorded, monkeypatch):
    args, episodes, _ = recorded
    monkeypatch.setattr(poco, "NUM_RANKS", 2)
    monkeypatch.setattr(poco, "RANK", 1)
    assert_same_episodes(load_demos(args), episodes[1::2])
    monkeypatch.setattr(poco, "NUM_RANKS", 7)
    with pytest.raises(poco.UserError, match="6 of 6 episodes last a chunk, "):
        load_demos(args)


WRONG_DATA = {
    "missing key": (lambda d: d.pop("rewards"), "rewards is not a file"),
    "unequal lengths": (lambda d: d.update(rewards=d["rewards"][1:]), "columns have 31 and 30 rows"),
    "action width": (lambda d: d.update(actions=d["actions"][:, :1]), "cannot reshape"),
    "actions outside": (lambda d: d["actions"].__setitem__((slice(2), 0), 11.5), "leave their box by 15.0%"),
    "no end": (lambda d: d.update(terminals=0 * d["terminals"], timeouts=0 * d["timeouts"]), "mark no end"),
    "all too short": (lambda d: d.update(timeouts=1 + 0 * d["timeouts"]), "0 of 31 episodes last a chunk"),
    "objects": (lambda d: d.update(rewards=np.array([Malicious()] * len(d["rewards"]))), "Object arrays"),
    "no rows": (lambda d: d.update({key: column[:0] for key, column in d.items()}), "mark no end"),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_wrong_data_gets_a_sentence(case, recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, _, data = recorded
    change, words = WRONG_DATA[case]
    change(data)
    np.savez(args.dataset, **data)
    with pytest.raises(poco.UserError, match=words):
        load_demos(args)
    assert not Path("code_was_run").exists()


def test_nan_in_a_file_is_refused(recorded, monkeypatch, tmp_path, capsys):
    args, _, data = recorded
    data["observations"][7, 0] = np.nan
    np.savez(args.dataset, **data)
    monkeypatch.chdir(tmp_path)
    assert main(poco, monkeypatch, **(RUN | {"dataset": args.dataset})) == 2
    assert "is NaN or infinite" in capsys.readouterr().err and not Path("runs").exists()


@pytest.mark.parametrize(("env_id", "success"), [("Reach", 1.0), ("Push", 0.87), ("PickAndPlace", 0.93)])
def test_demos_are_in_the_repository(env_id, success):
    demos = load_demos(Args(env_id=f"Fetch{env_id}-v4"))
    assert len(demos) == 200 and all(len(demo.actions) == 50 for demo in demos)
    assert poco.mean_success(demos) == pytest.approx(success, abs=0.006)


def test_demos_replay_in_their_environment():
    args = Args(env_id="FetchPush-v4", num_demos=1)
    (demo,) = load_demos(args)
    whole = np.load(ROOT / "demos/FetchPush-v4.npz")["observations"]
    (start_row,) = np.flatnonzero((whole == demo.obs[0]).all(1))
    envs = poco.Environments(args, first_seed=3 * 10**6 + int(start_row) // 51, num_envs=1)
    np.testing.assert_allclose(envs.observations()[0], demo.obs[0], atol=1e-6)
    envs.set_chunks(torch.tensor(demo.actions.reshape(1, -1)))
    (episode,) = (ended for _ in range(50) for ended in envs.step())
    np.testing.assert_allclose(episode.obs, demo.obs, atol=1e-3)
    np.testing.assert_allclose(episode.rewards, demo.rewards)


@pytest.mark.filterwarnings("ignore")
def test_minari_dataset(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    collector = minari.DataCollector(gym.make("FrankaKitchen-v1", max_episode_steps=12))
    kitchen, rng, recorded = collector.unwrapped.observation_space, np.random.default_rng(0), []
    for seed in range(3):
        obs, rewards = [gym.spaces.flatten(kitchen, collector.reset(seed=seed)[0])], []
        actions = rng.uniform(-1, 1, (12, *collector.action_space.shape))
        for action in actions:
            o, reward, _, _, _ = collector.step(action)
            obs, rewards = [*obs, gym.spaces.flatten(kitchen, o)], [*rewards, reward]
        recorded.append(Trajectory(np.array(obs), actions, np.array(rewards), False, np.nan))
    about = {"author": "a", "author_email": "a@b.c", "code_permalink": "-", "algorithm_name": "random"}
    collector.create_dataset(dataset_id="test/own-v0", **about)
    args = Args(env_id="FrankaKitchen-v1", dataset="test/own-v0")
    assert_same_episodes(load_demos(args), recorded)
    for wrong in ({"env_id": "FetchReach-v4"}, {"dataset": "nothing/here-v0"}):
        with pytest.raises(poco.UserError, match="cannot be used"):
            load_demos(poco.replace(args, **wrong))


# Tracking, pictures, README
def test_tensorboard_and_wandb_get_what_metrics_csv_gets(tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    _, folder = small_run(poco, tmp_path, monkeypatch, tensorboard=True, track=True)
    events = event_accumulator.EventAccumulator(str(folder)).Reload()
    for name in ("losses/qf_loss", "charts/episodic_return", "eval/success"):
        expected = {int(row["global_step"]): float(row[name]) for row in rows_of(folder) if row[name]}
        got = {event.step: event.value for event in events.Scalars(name)}
        assert got == pytest.approx(expected, rel=1e-5)
    assert list(folder.glob("wandb/offline-run-*/run-*.wandb"))


@pytest.mark.skipif(not os.environ.get("MUJOCO_GL"), reason="pictures need MUJOCO_GL=egl or osmesa")
def test_capture_video(tmp_path, monkeypatch):
    pytest.importorskip("moviepy")
    settings = {"env_id": "FetchReach-v4", "total_timesteps": 150, "capture_video": True}
    _, folder = small_run(poco, tmp_path, monkeypatch, **settings)
    assert len(list(folder.glob("videos/step 0/*.mp4"))) >= 2 and list(folder.glob("videos/step 150/*.mp4"))


def test_readme_names_only_what_is_there():
    readme = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", readme):
        assert link.startswith("http") or (ROOT / link).exists(), link
    options = {name for script in SCRIPTS.values() for name in vars(script.Args())}
    named = set(re.findall(r"--([a-z][a-z0-9-]+)", readme)) - {"nproc-per-node", "help"}
    assert {option.replace("-", "_").removeprefix("no_") for option in named} <= options
    for name in set(re.findall(r"`([a-z_]+)\(", readme)) - {"sqrt"}:
        owners = poco, ogpo, FlowPolicy, ogpo.FlowPolicy
        assert any(hasattr(owner, name) for owner in owners), name
