"""Tests of poco.py and ogpo.py: equations against float64 NumPy, samplers against known distributions, faults, and the command line.

What stands in both files is tested as poco.py's; a test holds that it is the same in ogpo.py.
"""

import ast
import copy
import csv
import functools
import gc
import itertools
import json
import math
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ogpo
import poco
from poco import Args, CriticEnsemble, FlowPolicy, ReplayBuffer, Trajectory

SCRIPTS = {"poco": poco, "ogpo": ogpo}
both_scripts = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def to_numpy(module):
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


def silu(x):
    return x / (1 + np.exp(-x))


def numpy_velocity(policy, obs, x, t):
    """The network of FlowPolicy, written again in float64."""
    w = to_numpy(policy)
    obs = np.clip((obs - w["normalize.mean"]) / w["normalize.std"], -10, 10)
    h = np.concatenate([obs, x, t], axis=1)
    for layer in (0, 2, 4):
        h = silu(h @ w[f"net.{layer}.weight"].T + w[f"net.{layer}.bias"])
    return h @ w["net.6.weight"].T + w["net.6.bias"]


# The two files


def without(source, names):
    """The source's lines without the docstring and the top-level definitions of these names."""
    lines, body = source.splitlines(), ast.parse(source).body
    for node in body:
        own = {target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)} | {getattr(node, "name", "")}
        if own & names or node is body[0]:
            first = min([node.lineno] + [decorator.lineno for decorator in getattr(node, "decorator_list", ())])
            lines[first - 1 : node.end_lineno] = [None] * (node.end_lineno - first + 1)
    return [line for line in lines if line]


def args_fields(script):
    """Each argument's type and help; the defaults may differ."""
    source = Path(script.__file__).read_text().splitlines()
    (node,) = (node for node in ast.parse("\n".join(source)).body if getattr(node, "name", "") == "Args")
    fields = [line for line in node.body if isinstance(line, ast.AnnAssign)]
    return {field.target.id: (ast.unparse(field.annotation), source[field.lineno - 1].partition("# ")[2]) for field in fields}


def test_what_both_scripts_share_is_identical_to_the_letter():
    own = {"METHOD", "Args", "LOWEST", "HIGHEST", "update_critic", "update_policy", "COLUMNS", "main"}
    own |= {"posterior_weights", "poco_loss"}  # POCO
    own |= {"reduce_next_q", "chain_step", "sample_chain", "chain_log_prob", "group_advantage", "chi2_penalised_q", "ppo_loss"}  # OGPO
    shared = [without(Path(script.__file__).read_text(), own) for script in SCRIPTS.values()]
    assert len(shared[0]) > 300
    assert shared[0] == shared[1]


def test_arguments_of_the_same_name_mean_the_same():
    fields = [args_fields(script) for script in SCRIPTS.values()]
    shared = [name for name in fields[0] if name in fields[1]]
    assert shared == [name for name in fields[1] if name in fields[0]] and len(shared) > 25
    for name in shared:
        assert fields[0][name] == fields[1][name] and fields[0][name][1]


# Flow policy


def test_bc_loss_is_the_masked_squared_error_of_the_velocity():
    rng = np.random.default_rng(0)
    policy = FlowPolicy(obs_dim=3, chunk_dim=6)
    policy.normalize.fit(torch.tensor(rng.normal(2, 3, (50, 3))).float())
    obs, chunk, noise, time_ = (rng.normal(size=(4, n)) for n in (3, 6, 6, 1))
    valid = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    error = (numpy_velocity(policy, obs, (1 - time_) * noise + time_ * chunk, time_) - (chunk - noise)) ** 2
    masked = [error[i, : 2 * valid[i].sum()].mean() for i in range(4)]  # T = 3 actions of 2 numbers

    given = [torch.tensor(value).float() for value in (obs, chunk, valid, noise, time_)]
    np.testing.assert_allclose(policy.bc_loss(*given).detach(), masked, rtol=1e-5)
    given[2] = None
    np.testing.assert_allclose(policy.bc_loss(*given).detach(), error.mean(1), rtol=1e-5)


def test_sample_is_euler_integration_from_noise():
    rng = np.random.default_rng(0)
    policy = FlowPolicy(obs_dim=3, chunk_dim=4, flow_steps=7)
    obs, x = rng.normal(size=(5, 3)), rng.normal(size=(5, 4))
    sampled = policy.sample(torch.tensor(obs).float(), torch.tensor(x).float())
    for k in range(7):
        x = x + numpy_velocity(policy, obs, x, np.full((5, 1), k / 7)) / 7
    np.testing.assert_allclose(sampled.detach(), np.clip(x, -1, 1), rtol=1e-4, atol=1e-6)
    assert policy.sample(torch.zeros(1000, 3)).abs().max() <= 1


def test_flow_fitted_to_two_modes_samples_both_in_proportion():
    policy = FlowPolicy(obs_dim=1, chunk_dim=2, hidden_dim=64, flow_steps=20)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=2000)
    for _ in range(2000):
        obs = torch.randint(2, (512, 1)).float()  # the share of the upper mode is 0.3 for one observation, 0.8 for the other
        upper = torch.rand(512, 1) < 0.3 + 0.5 * obs
        chunk = torch.where(upper, 0.6, -0.4) + 0.05 * torch.randn(512, 2)
        poco.gradient_step(optimizer, policy.bc_loss(obs, chunk, None).mean())
        schedule.step()
    with torch.no_grad():
        for value, share in ((0.0, 0.3), (1.0, 0.8)):
            x = policy.sample(torch.full((4000, 1), value))
            upper = x[:, 0] > 0.1
            assert upper.float().mean() == pytest.approx(share, abs=0.05)
            np.testing.assert_allclose(x[upper].mean(0), 0.6, atol=0.05)
            np.testing.assert_allclose(x[~upper].mean(0), -0.4, atol=0.05)
            assert x[upper].std(0).max() < 0.15 and x[~upper].std(0).max() < 0.15


def test_normalizer_survives_constant_features_and_travels_in_the_state_dict():
    policy = FlowPolicy(obs_dim=3, chunk_dim=2)
    obs = torch.stack([torch.full((100,), 7.0), torch.full((100,), 1e-9), torch.randn(100) * 5 + 1], dim=1)
    policy.normalize.fit(obs)
    assert policy.normalize(obs).abs().max() < 5
    assert policy.normalize(obs + 1).abs().max() <= 10
    np.testing.assert_allclose(policy.normalize(obs)[:, 2].mean(), 0, atol=1e-5)
    np.testing.assert_allclose(policy.normalize(obs)[:, 2].std(correction=0), 1, rtol=1e-5)
    copy = FlowPolicy(obs_dim=3, chunk_dim=2)
    copy.load_state_dict(policy.state_dict())
    assert torch.equal(copy.normalize(obs), policy.normalize(obs))


# Critic


def test_critic_ensemble_is_independent_networks_with_layer_norm():
    rng = np.random.default_rng(0)
    critic = CriticEnsemble(obs_dim=3, chunk_dim=2, num_critics=4, hidden_dim=16)
    critic.normalize.fit(torch.tensor(rng.normal(1, 2, (50, 3))).float())
    obs, chunk = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    w = to_numpy(critic)
    expected = []
    for m in range(4):
        h = np.concatenate([(obs - w["normalize.mean"]) / w["normalize.std"], chunk], axis=1)
        for layer in (0, 3, 6):
            h = h @ w[f"net.{layer}.weight"][m] + w[f"net.{layer}.bias"][m]
            h = silu((h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5))
        expected.append((h @ w["head.weight"][m] + w["head.bias"][m])[:, 0])
    q = critic(torch.tensor(obs).float(), torch.tensor(chunk).float())
    np.testing.assert_allclose(q.detach(), expected, rtol=1e-4, atol=1e-5)
    assert q.std(0).min() > 1e-3  # members start apart


def test_aggregate():
    q = torch.tensor([[1.0, 5.0], [3.0, 1.0]])
    assert poco.aggregate(q, "mean").tolist() == [2, 3]
    assert poco.aggregate(q, "min").tolist() == [1, 1]


def test_critic_loss_leaves_padded_windows_out():
    q, target = torch.tensor([[1.0, 50.0], [3.0, 50.0]], requires_grad=True), torch.tensor([2.0, 0.0])
    loss = poco.critic_loss(q, target, torch.tensor([[1.0, 1.0], [1.0, 0.0]]))
    loss.backward()
    assert loss.item() == 1
    assert q.grad.tolist() == [[-1, 0], [1, 0]]
    assert poco.critic_loss(q, target, torch.tensor([[1.0, 0.0], [1.0, 0.0]])) == 0  # no whole window: no NaN


class ConstantPolicy:
    def __init__(self, chunk_dim):
        self.chunk_dim = chunk_dim

    def sample(self, obs):
        return torch.ones(len(obs), self.chunk_dim)


@pytest.mark.parametrize("terminated", [True, False])
def test_critic_converges_to_the_values_of_a_small_mdp(terminated):
    """States in a row, reward 1 for the fourth step; then the end, or on and on round a ring of four with a time limit in between."""
    gamma, n = 0.8, 4 if terminated else 10
    state = np.arange(n + 1) if terminated else np.arange(n + 1) % 4
    buffer = ReplayBuffer(100, 5, 1, chunk_size=2, gamma=gamma)
    buffer.add_episode(Trajectory(np.eye(5)[state], np.ones((n, 1)), 1.0 * (np.arange(n) % 4 == 3), terminated, 1.0, 0))
    args = Args(chunk_size=2, gamma=gamma, tau=0.05)
    critic, target = (CriticEnsemble(5, 2, 2, hidden_dim=32) for _ in range(2))
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3, fused=True)
    for _ in range(1500):
        poco.update_critic(ConstantPolicy(2), critic, target, optimizer, buffer.windows(buffer.draw(32)), args)
    steps = [0, 2] if terminated else [0, 1, 2, 3]  # of a terminated row, an odd step only sees padded windows further on
    values = [gamma ** (3 - i) / (1 if terminated else 1 - gamma**4) for i in steps]
    q = critic(torch.eye(5)[steps], torch.ones(len(steps), 2))
    np.testing.assert_allclose(q.detach(), [values, values], rtol=0.03)


# The algorithm


def test_posterior_weights():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(6, 5))
    for temperature in (0.1, 1.0, 30.0):
        expected = np.exp(q / temperature) / np.exp(q / temperature).sum(1, keepdims=True)
        np.testing.assert_allclose(poco.posterior_weights(torch.tensor(q), temperature), expected, rtol=1e-10)
    q = torch.tensor(q).float()
    np.testing.assert_allclose(poco.posterior_weights(q, 1e9), 1 / 5, rtol=1e-5)
    assert torch.equal(poco.posterior_weights(q, 1e-6), torch.nn.functional.one_hot(q.argmax(1), 5).float())
    for extreme in (torch.tensor([[1e6, -1e6, 1e6]]), torch.tensor([[-1e6, -1e6, -1e6]])):
        weights = poco.posterior_weights(extreme, 1e-3)
        assert torch.isfinite(weights).all() and weights.sum().item() == pytest.approx(1)


def test_poco_loss_is_equation_23():
    rng = np.random.default_rng(0)
    losses, bc = rng.exponential(size=(7, 4)), rng.exponential(size=9)
    weights = rng.dirichlet(np.ones(4), size=7)
    for beta, zeta in ((1.0, 0.4), (0.3, 1.0), (0.0, 0.5)):
        posterior = np.mean([sum(weights[s, j] * min(losses[s, j], zeta) for j in range(4)) for s in range(7)])
        loss = poco.poco_loss(*map(torch.tensor, (losses, weights, bc)), beta, zeta)
        assert loss.item() == pytest.approx(beta * posterior + bc.mean(), rel=1e-12)


def test_a_clipped_candidate_gives_no_gradient():
    policy = FlowPolicy(obs_dim=2, chunk_dim=2)
    obs, chunk = torch.randn(2, 2), torch.tensor([[0.1, 0.1], [1.0, -1.0]])
    noise, moment = torch.tensor([[0.0, 0.0], [3.0, 3.0]]), torch.full((2, 1), 0.5)
    for row in (0, 1):
        losses = policy.bc_loss(obs, chunk, None, noise, moment)
        assert losses[0] < 1 < losses[1]
        weights = torch.zeros(1, 2)
        weights[0, row] = 1
        policy.zero_grad()
        poco.poco_loss(losses.view(1, 2), weights, torch.zeros(1), 1.0, 1.0).backward()
        gradient = sum(parameter.grad.abs().sum() for parameter in policy.parameters())
        assert (gradient > 1e-3) if row == 0 else (gradient == 0)


def two_mode_bandit(policy=None, **settings):
    """A clone with 80 % of its mass at -0.5 and 20 % at +0.5, where +0.5 is worth 1 and -0.5 nothing. Returns: share of +0.5 after POCO."""
    args = Args(num_candidates=8, posterior_batch_size=64, **settings)
    policy = policy or FlowPolicy(obs_dim=1, chunk_dim=1, hidden_dim=64, flow_steps=10)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3, fused=True)

    def value(obs, chunk):  # stands for the critics, (M, B)
        return (chunk.T > 0).float()

    for step in range(1200):
        chunk = torch.where(torch.rand(128, 1) < 0.2, 0.5, -0.5) + 0.05 * torch.randn(128, 1)
        batch = poco.Batch(torch.zeros(128, 1), chunk, None, None, None, torch.ones(128, 1))
        if step < 600:
            poco.gradient_step(optimizer, policy.bc_loss(batch.obs, chunk, None).mean())
        else:
            metrics = poco.update_policy(policy, value, optimizer, batch, args)
    with torch.no_grad():
        return (policy.sample(torch.zeros(4000, 1)) > 0).float().mean().item(), metrics


def test_poco_moves_the_mass_to_the_better_mode():
    share, metrics = two_mode_bandit(temperature=0.05, clip_threshold=5.0, posterior_coef=3.0)
    assert share > 0.45  # a fixed point between the buffer's 0.2 and the posterior's nearly 1
    assert metrics["losses/clip_fraction"] < 0.2 and 1 <= metrics["losses/effective_samples"] <= 8
    assert two_mode_bandit(temperature=1e6, clip_threshold=5.0, posterior_coef=3.0)[0] < 0.35  # uniform weights teach nothing


# OGPO


class MixtureFlow:
    """The exact flow from N(0, I) to a mixture of Gaussians N(means_c, std^2 I), in closed form and float64."""

    def __init__(self, means, std, shares, flow_steps=50):
        self.means, self.std, self.shares = torch.tensor(means).double(), std, torch.tensor(shares).double()
        self.chunk_dim, self.flow_steps = self.means.shape[1], flow_steps

    def velocity(self, obs, x, t):
        var = (1 - t) ** 2 + (t * self.std) ** 2  # of every component of x_t
        rel = x[:, None] - t[:, None] * self.means  # (B, C, D)
        share = torch.softmax(self.shares.log() - rel.square().sum(2) / (2 * var), dim=1)  # of a component, given x_t
        v = self.means + ((t * self.std**2 - (1 - t)) / var)[:, None] * rel  # E[x_1 - x_0 | x_t, component]
        return (share[..., None] * v).sum(1)


GAUSSIAN = MixtureFlow([[0.4, -0.3]], 0.3, [1.0])
TWO_MODES = MixtureFlow([[0.6, 0.6], [-0.4, -0.4]], 0.1, [0.3, 0.7])


def wrong_chain(policy, obs, sigma, noise, corrected, with_sqrt_dt):
    """The stochastic sampler with one of its two parts left out. Returns: (2, B, D), first and last."""
    x = noise
    for k in range(policy.flow_steps):
        t = torch.full_like(x[:, :1], k / policy.flow_steps)
        v = policy.velocity(obs, x, t)
        drift = v + sigma**2 / 2 * (t * v - x) * corrected
        scale = policy.flow_steps**-0.5 if with_sqrt_dt else 1.0
        x = x + drift / policy.flow_steps + sigma * torch.sqrt(1 - t) * scale * torch.randn_like(x)
    return torch.stack([noise, x])


def assert_marginals_are_those_of_the_ode(sampler, flow, sigma, n=4000):
    """Mean, covariance and mode shares, each within 4.5 standard errors of the ODE's from the same sampler with sigma 0."""
    obs, noise = torch.zeros(n, 1), torch.randn(n, flow.chunk_dim).double()
    x, ode = sampler(flow, obs, sigma, noise)[-1], sampler(flow, obs, 0.0, torch.randn(n, flow.chunk_dim).double())[-1]
    features = [x[:, 0], x[:, 1], x[:, 0] * x[:, 1], x[:, 0] ** 2, x[:, 1] ** 2, (x[:, 0] > 0.1).double()]
    of_ode = [ode[:, 0], ode[:, 1], ode[:, 0] * ode[:, 1], ode[:, 0] ** 2, ode[:, 1] ** 2, (ode[:, 0] > 0.1).double()]
    for a, b in zip(features, of_ode, strict=True):
        assert abs(a.mean() - b.mean()) < 4.5 * torch.sqrt((a.var() + b.var()) / n)
    for mode in (x[:, 0] > 0.1, x[:, 0] <= 0.1) if flow is TWO_MODES else ():  # each mode as wide as it should be
        assert x[mode].std(0).max() < 0.1 * 1.08 and x[mode].std(0).min() > 0.1 * 0.88


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("flow", [GAUSSIAN, TWO_MODES], ids=["gaussian", "two modes"])
def test_the_stochastic_sampler_keeps_the_marginals_of_the_ode(flow, sigma):
    assert_marginals_are_those_of_the_ode(lambda *args: ogpo.sample_chain(*args)[0], flow, sigma)
    if sigma >= 0.5:  # below, the correction is smaller than the Monte-Carlo error
        with pytest.raises(AssertionError):
            assert_marginals_are_those_of_the_ode(functools.partial(wrong_chain, corrected=False, with_sqrt_dt=True), flow, sigma)
    if sigma > 0:
        with pytest.raises(AssertionError):
            assert_marginals_are_those_of_the_ode(functools.partial(wrong_chain, corrected=True, with_sqrt_dt=False), flow, sigma)
    assert_marginals_are_those_of_the_ode(functools.partial(wrong_chain, corrected=True, with_sqrt_dt=True), flow, sigma)


def test_sample_chain_with_sigma_zero_is_the_ode():
    policy = FlowPolicy(obs_dim=3, chunk_dim=4, flow_steps=7)
    obs, noise = torch.randn(5, 3), torch.randn(5, 4)
    chain, _ = ogpo.sample_chain(policy, obs, 0.0, noise)
    assert chain.shape == (8, 5, 4) and torch.equal(chain[0], noise)
    torch.testing.assert_close(chain[-1].clamp(-1, 1), policy.sample(obs, noise))


def numpy_chain_log_prob(policy, obs, chain, sigma):
    """log N(x_{k+1}; mean, std^2) of every step and dimension, averaged, in float64."""
    steps, total = len(chain) - 1, 0
    for k in range(steps):
        x, t, dt = chain[k], np.full((len(obs), 1), k / steps), 1 / steps
        v = numpy_velocity(policy, obs, x, t)
        sigma_t = sigma * np.sqrt(1 - k / steps)
        score = (t * v - x) / (1 - t)
        mean, std = x + dt * (v + sigma_t**2 / 2 * score), sigma_t * np.sqrt(dt)
        total += -(((chain[k + 1] - mean) / std) ** 2) / 2 - np.log(std) - np.log(2 * np.pi) / 2
    return total.mean(1) / steps


def test_chain_log_prob():
    rng = np.random.default_rng(0)
    policy = FlowPolicy(obs_dim=3, chunk_dim=4, flow_steps=6)
    policy.normalize.fit(torch.tensor(rng.normal(2, 3, (50, 3))).float())
    obs = rng.normal(size=(5, 3))
    for sigma in (0.1, 1.0):
        chain, own_log_prob = ogpo.sample_chain(policy, torch.tensor(obs).float(), sigma)
        np.testing.assert_allclose(own_log_prob, numpy_chain_log_prob(policy, obs, chain.double().numpy(), sigma), rtol=1e-4, atol=1e-4)
        for points in (chain, chain + 0.01 * torch.randn_like(chain)):  # its own chain and another
            log_prob = ogpo.chain_log_prob(policy, torch.tensor(obs).float(), points, sigma)
            expected = numpy_chain_log_prob(policy, obs, points.double().numpy(), sigma)
            np.testing.assert_allclose(log_prob.detach(), expected, rtol=1e-4, atol=1e-4)


def test_log_prob_of_a_sampled_chain_is_the_density_of_its_own_noise():
    sigma, n, steps = 0.3, 7, 50
    torch.manual_seed(5)
    chain, log_prob = ogpo.sample_chain(TWO_MODES, torch.zeros(n, 1), sigma, torch.zeros(n, 2).double())
    torch.manual_seed(5)
    xi = torch.stack([torch.randn(n, 2, dtype=torch.float64) for _ in range(steps)])  # the same draws
    std = sigma * torch.sqrt(1 - torch.arange(steps)[:, None, None] / steps) / steps**0.5
    expected = (-(xi**2) / 2 - std.log() - np.log(2 * np.pi) / 2).mean((0, 2))
    for values in (log_prob, ogpo.chain_log_prob(TWO_MODES, torch.zeros(n, 1), chain, sigma)):
        torch.testing.assert_close(values, expected, rtol=1e-6, atol=1e-6)


def test_group_advantage():
    q = np.random.default_rng(0).normal(size=(3, 6, 4))
    advantage = q - q.mean(2, keepdims=True)
    plain = ogpo.group_advantage(torch.tensor(q), False)
    np.testing.assert_allclose(plain, advantage.mean(0), rtol=1e-10)
    np.testing.assert_allclose(plain.mean(1), 0, atol=1e-12)  # the baseline is the group's own mean
    expected = np.zeros((6, 4))
    for s, j in np.ndindex(6, 4):
        members = advantage[:, s, j]
        expected[s, j] = members.min() if (members > 0).all() else members.max() if (members < 0).all() else 0
    np.testing.assert_allclose(ogpo.group_advantage(torch.tensor(q), True), expected, rtol=1e-10)
    assert 0 < (expected == 0).mean() < 1


def test_conservative_advantage_on_hand_made_ensembles():
    q = torch.tensor([[[1.0, -1.0]], [[3.0, -3.0]]])  # two critics, one state, two chains: both prefer the first
    assert ogpo.group_advantage(q, True).tolist() == [[1, -1]]
    q[1] *= -1  # they disagree
    assert ogpo.group_advantage(q, True).tolist() == [[0, 0]]
    assert ogpo.group_advantage(q, False).tolist() == [[-1, 1]]


def test_chi2_penalised_q():
    rng = np.random.default_rng(0)
    q, ratio = rng.normal(size=(3, 6, 4)), rng.exponential(size=(6, 4))
    w = 1 / (1 + np.exp(-5 * (ratio - 1)))
    expected = (1 - w) * q.mean(0) + w * q.min(0) - 0.1 * q.std(0) * ratio
    np.testing.assert_allclose(ogpo.chi2_penalised_q(torch.tensor(q), torch.tensor(ratio), 0.1, 5.0), expected, rtol=1e-10)
    # far from the slow policy the pessimist speaks, near it the mean
    far, near = (ogpo.chi2_penalised_q(torch.tensor(q), torch.full((6, 4), r).double(), 0.0, 20.0) for r in (4.0, 0.01))
    np.testing.assert_allclose(far, q.min(0), atol=1e-6)
    np.testing.assert_allclose(near, q.mean(0), atol=1e-6)


def test_reduce_next_q():
    q = np.random.default_rng(0).normal(size=(6, 8))
    np.testing.assert_allclose(ogpo.reduce_next_q(torch.tensor(q), "mean"), q.mean(1))
    np.testing.assert_allclose(ogpo.reduce_next_q(torch.tensor(q), "median"), np.median(q, axis=1))


def test_ppo_loss():
    rng = np.random.default_rng(0)
    log_prob, old_log_prob, advantage = rng.normal(size=(3, 200)) * [[0.05], [0.05], [1.0]]
    ratio = np.exp(log_prob - old_log_prob)
    expected = -np.mean([min(r * a, np.clip(r, 0.97, 1.03) * a) for r, a in zip(ratio, advantage, strict=True)])
    loss, metrics = ogpo.ppo_loss(*map(torch.tensor, (log_prob, old_log_prob, advantage)), 0.03)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert metrics["losses/clip_fraction"].item() == pytest.approx((np.abs(ratio - 1) > 0.03).mean())


def test_ppo_gradient_stops_outside_the_clip_and_only_there():
    log_prob = torch.tensor([0.1, 0.1, -0.1, -0.1], requires_grad=True)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0])
    ogpo.ppo_loss(log_prob, torch.zeros(4), advantage, 0.05)[0].backward()
    ratio = log_prob.detach().exp()
    torch.testing.assert_close(log_prob.grad, torch.tensor([0, 1, -1, 0]) * ratio / 4)


def test_at_the_old_parameters_the_ratio_is_one_and_the_gradient_the_policy_gradient():
    policy = FlowPolicy(obs_dim=2, chunk_dim=2)
    obs, advantage = torch.randn(12, 2), torch.randn(12)
    chain, old_log_prob = ogpo.sample_chain(copy.deepcopy(policy), obs, 0.2)
    loss, metrics = ogpo.ppo_loss(ogpo.chain_log_prob(policy, obs, chain, 0.2), old_log_prob, advantage, 0.01)
    assert metrics["losses/clip_fraction"] == 0 and metrics["losses/ratio_std"] < 1e-6
    gradient = torch.autograd.grad(loss, policy.parameters())
    plain = torch.autograd.grad(-(advantage * ogpo.chain_log_prob(policy, obs, chain, 0.2)).mean(), policy.parameters())
    for a, b in zip(gradient, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@functools.cache
def bandit_clone():
    """A policy with 80 % of its mass at -0.5 and 20 % at +0.5."""
    policy = ogpo.FlowPolicy(obs_dim=1, chunk_dim=1, hidden_dim=32, flow_steps=5)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3, fused=True)
    for _ in range(600):
        chunk = torch.where(torch.rand(128, 1) < 0.2, 0.5, -0.5) + 0.05 * torch.randn(128, 1)
        ogpo.gradient_step(optimizer, policy.bc_loss(torch.zeros(128, 1), chunk, None).mean())
    return policy


def ogpo_bandit(steps=200, success_chunk=None, **settings):
    """Starts from the clone, where -0.5 is worth 0 and +0.5 is worth 1 to 2. Returns: share of +0.5 after OGPO, metrics, policies."""
    fixed = {"group_size": 8, "ppo_batch_size": 32, "sigma": 1.0, "clip_epsilon": 0.02, "policy_tau": 0.1, "num_critics": 2}
    args = ogpo.Args(**(fixed | {"success_coef": 0.0, "conservative": False} | settings))
    policy = copy.deepcopy(bandit_clone())
    old_policy, slow_policy = copy.deepcopy(policy), copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, fused=True)

    def value(obs, chunk):  # stands for the critics, (M, B)
        return (chunk.T > 0).float() * torch.tensor([[1.0], [2.0]])

    batch = ogpo.Batch(torch.zeros(128, 1), torch.zeros(128, 1), None, None, None, torch.ones(128, 1))
    success = batch._replace(chunk=torch.full((128, 1), success_chunk or 0.0))
    for _ in range(steps):
        metrics = ogpo.update_policy(policy, old_policy, slow_policy, value, optimizer, batch, success, args)
    with torch.no_grad():
        share = (policy.sample(torch.zeros(4000, 1)) > 0).float().mean().item()
    return share, metrics, (policy, old_policy, slow_policy)


def test_ppo_on_the_chain_moves_the_mass_to_the_better_mode():
    for conservative in (False, True):
        share, metrics, (policy, old_policy, slow_policy) = ogpo_bandit(conservative=conservative)
        assert share > 0.9
        assert metrics["losses/group_q_std"] < 0.4  # 0.6 in the clone; now nearly all chains end in the better mode

        def distance(network, policy=policy):
            return sum((a - b).abs().sum() for a, b in zip(network.parameters(), policy.parameters(), strict=True))

        assert 0 < distance(old_policy) < distance(slow_policy)


def test_the_chi2_penalty_keeps_away_from_chains_on_which_the_critics_disagree():
    assert ogpo_bandit(steps=60, chi2_coef=20.0)[0] < ogpo_bandit(steps=60)[0] - 0.1


def test_success_cloning_pulls_towards_the_successes():
    assert ogpo_bandit(success_coef=5.0, success_chunk=-0.5)[0] < 0.1  # against the critics, which prefer the other mode


def test_next_chunk_samples_average_the_td_target():
    """One state, whose next value depends on the chunk drawn: more samples, less spread of the target."""

    class NoisyPolicy:
        def sample(self, obs):
            return torch.randn(len(obs), 1)

    class Recorder(torch.nn.Linear):
        def forward(self, obs, chunk):
            return super().forward(chunk).T

    batch = ogpo.Batch(
        torch.zeros(4000, 1), torch.zeros(4000, 1), torch.zeros(4000), torch.zeros(4000, 1), torch.zeros(4000), torch.ones(4000, 1)
    )
    losses = {}
    for n, reduction in ((1, "mean"), (8, "mean"), (8, "median")):
        critic, target = Recorder(1, 1), Recorder(1, 1)
        with torch.no_grad():
            for network, weight in ((critic, 0.0), (target, 1.0)):
                network.weight.fill_(weight)
                network.bias.fill_(0.0)
        args = ogpo.Args(next_samples=n, next_reduction=reduction, chunk_size=1, gamma=1.0)
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.0, fused=True)
        losses[n, reduction] = ogpo.update_critic(NoisyPolicy(), critic, target, optimizer, batch, args)["losses/qf_loss"].item()
    assert losses[1, "mean"] == pytest.approx(1, rel=0.1)  # the variance of one draw
    assert losses[8, "mean"] == pytest.approx(1 / 8, rel=0.1)
    assert losses[8, "median"] == pytest.approx(0.168, rel=0.1)  # of the median of eight normal draws


# Replay windows


def test_td_target_and_windows_on_a_hand_made_episode():
    gamma, rewards = 0.9, np.array([1.0, 2.0, 4.0, 8.0])
    obs = np.arange(5.0)[:, None]
    for terminated in (True, False):
        buffer = ReplayBuffer(10, 1, 1, chunk_size=3, gamma=gamma)
        buffer.add_episode(Trajectory(obs, np.arange(1.0, 5)[:, None] / 10, rewards, terminated, 0.0, 0))
        batch = buffer.windows(buffer.draw(200))
        next_q = 100 + batch.next_obs[:, 0]
        target = poco.td_target(batch.reward, next_q, batch.terminated, gamma, 3)
        seen = {int(o): i for i, o in enumerate(batch.obs[:, 0])}
        assert sorted(seen) == [0, 1, 2, 3]
        # window 0 ends inside the episode, window 1 at its end, windows 2 and 3 are padded
        assert target[seen[0]].item() == pytest.approx(1 + 0.9 * 2 + 0.81 * 4 + 0.729 * 103, rel=1e-6)
        assert target[seen[1]].item() == pytest.approx(2 + 0.9 * 4 + 0.81 * 8 + (0 if terminated else 0.729 * 104), rel=1e-6)
        assert batch.terminated[[seen[i] for i in range(4)]].tolist() == [0, terminated, terminated, terminated]
        assert batch.valid[[seen[i] for i in range(4)]].tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
        np.testing.assert_allclose(batch.chunk[seen[2]], [0.3, 0.4, 0], rtol=1e-6)
        assert batch.reward[seen[2]].item() == pytest.approx(4 + 0.9 * 8, rel=1e-6)
        assert batch.next_obs[seen[2]].item() == 4


# Replay buffer


@pytest.mark.parametrize("capacity", [1000, 37, 5])
def test_buffer_never_mixes_episodes(capacity):
    """Every step carries its episode and its place in it; windows must be runs of one episode, the newest steps must all be there."""
    rng = np.random.default_rng(0)
    buffer, written = ReplayBuffer(capacity, 2, 1, chunk_size=4, gamma=0.9), []
    for episode in range(60):
        n = int(rng.integers(1, 12))
        obs = np.stack([np.full(n + 1, episode), np.arange(n + 1)], axis=1)
        buffer.add_episode(Trajectory(obs, (episode * 100 + np.arange(n))[:, None], np.ones(n), episode % 2 == 0, 0.0, 0))
        written += [(episode, step, n) for step in range(n)]
        lengths = {e: length for e, _, length in written}
        batch = buffer.windows(buffer.draw(300))
        seen = set()
        for obs, chunk, _, next_obs, terminated, valid in zip(*batch, strict=True):
            e, step = obs.int().tolist()
            k = min(4, lengths[e] - step)
            assert valid.tolist() == [1] * k + [0] * (4 - k)
            assert chunk.tolist() == [e * 100 + step + i for i in range(k)] + [0] * (4 - k)
            assert next_obs.tolist() == [e, step + k]
            assert terminated == (e % 2 == 0 and step + k == lengths[e])
            seen.add((e, step, lengths[e]))
        assert buffer.size == min(len(written), capacity)
        assert seen <= set(written[-capacity:])


# Environments


class Counter(gym.Env):
    """Counts its steps. Episodes of even length terminate, those of odd length hit a time limit; length 5 is a success."""

    observation_space = gym.spaces.Dict({"count": gym.spaces.Box(-np.inf, np.inf, (1,)), "goal": gym.spaces.Box(-1, 1, (2,))})
    action_space = gym.spaces.Box(np.array([[0.0], [-4.0]]), np.array([[10.0], [4.0]]), (2, 1), np.float64)

    def __init__(self, render_mode=None, nan_after=None, unbounded=False):
        self.nan_after, self.steps = nan_after, 0
        if unbounded:
            self.action_space = gym.spaces.Box(-np.inf, np.inf, (1,))

    def obs(self):
        poisoned = self.nan_after is not None and self.steps > self.nan_after
        return {"count": np.array([np.nan if poisoned else self.t], np.float32), "goal": np.zeros(2, np.float32)}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t, self.end = 0, int(self.np_random.integers(3, 9))
        return self.obs(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t, self.steps = self.t + 1, self.steps + 1
        over = self.t >= self.end
        return self.obs(), float(action[0, 0]), over and self.end % 2 == 0, over and self.end % 2 == 1, {"is_success": float(self.end == 5)}


gym.register("Counter-v0", Counter)
gym.register("CounterNaN-v0", Counter, kwargs={"nan_after": 300})
gym.register("NoBounds-v0", Counter, kwargs={"unbounded": True})


def test_actions_are_mapped_to_the_environments_box_and_observations_flattened():
    env = poco.make_env("Counter-v0", 2)
    assert env.observation_space.shape == (3,) and env.action_space.shape == (2,)
    env.reset(seed=0)
    for action, reward in ((-1.0, 0.0), (0.0, 5.0), (1.0, 10.0)):
        assert env.step(np.full(2, action, np.float32))[1] == pytest.approx(reward)


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_rollout_has_no_reset_steps_and_starts_a_chunk_with_every_episode(chunk_size):
    seen_at_start, episodes = [], []

    def act(obs):
        seen_at_start.extend(obs[:, 0])
        return np.tile(np.repeat(np.arange(chunk_size) / 10, 2), (len(obs), 1))  # an action tells its place in the chunk

    runner = poco.rollout(lambda: poco.make_env("Counter-v0", chunk_size), 3, act, chunk_size, iter(range(10**6)))
    steps = 0
    while len(episodes) < 40:
        episodes += next(runner)
        steps += 3
    for episode in episodes:
        n = len(episode.actions)
        assert episode.obs[:, 0].tolist() == list(range(n + 1))  # the last one is the end's, not the next episode's first
        np.testing.assert_allclose(episode.actions[:, 0], np.arange(n) % chunk_size / 10, rtol=1e-6)
        np.testing.assert_allclose(episode.rewards, 5 + 5 * episode.actions[:, 0], rtol=1e-6)
        assert episode.terminated == (n % 2 == 0) and episode.success == (n == 5)
        replay = poco.make_env("Counter-v0", chunk_size)
        replay.reset(seed=episode.seed)
        assert replay.unwrapped.end == n
    assert len({episode.seed for episode in episodes}) == len(episodes)
    assert steps - 3 * 8 <= sum(len(episode.actions) for episode in episodes) <= steps
    assert all(count % chunk_size == 0 for count in seen_at_start)


def test_evaluation_counts_every_seed_once():
    args = Args(env_id="Counter-v0", chunk_size=2, num_envs=3)
    policy, critic = poco.make_networks(args, torch.device("cpu"))
    ends = []
    for seed in range(20):
        env = gym.make("Counter-v0")
        env.reset(seed=seed)
        ends.append(env.unwrapped.end)
    result = poco.evaluate(policy, critic, args, 1, 20)
    assert result["success"] == np.mean(np.array(ends) == 5) and result["successes"] == ends.count(5)


def test_best_of_n_takes_the_candidate_the_critics_prefer():
    policy = FlowPolicy(obs_dim=2, chunk_dim=4)

    def critic(obs, chunk):
        return torch.stack([chunk[:, 0] + obs[:, 0], chunk[:, 0]])

    obs = np.zeros((6, 2))
    noise = torch.randn(6 * 8, 4, generator=torch.Generator().manual_seed(3))
    candidates = policy.sample(torch.zeros(48, 2), noise).view(6, 8, 4)
    expected = [group[group[:, 0].argmax()].tolist() for group in candidates]
    chosen = poco.choose_chunks(policy, critic, 8, torch.Generator().manual_seed(3), obs)
    np.testing.assert_allclose(chosen, expected, rtol=1e-5)


@pytest.mark.parametrize("env_id", ["FetchReach-v4", "FetchPush-v4", "FetchPickAndPlace-v4"])
def test_demonstrators_succeed(env_id):
    episodes = poco.make_demonstrations(Args(env_id=env_id, num_demos=20, demo_noise=0.2))
    assert len(episodes) == 20 and np.mean([episode.success for episode in episodes]) >= 0.9
    assert all(np.abs(episode.actions).max() <= 1 and len(episode.obs) == len(episode.actions) + 1 for episode in episodes)
    assert np.std([episode.obs[0, 3:6] for episode in episodes], axis=0).max() > 0.01  # goals differ


def test_demonstrations_and_steps_of_the_default_arguments():
    args = Args(num_demos=2, num_envs=2)
    assert args.env_id == "FetchPickAndPlace-v4"
    assert [episode.obs.shape for episode in poco.make_demonstrations(args)] == [(51, 31)] * 2


def test_wilson_interval():
    np.testing.assert_allclose(poco.wilson_interval(95, 100), (0.8882, 0.9785), atol=1e-4)
    np.testing.assert_allclose(poco.wilson_interval(0, 10), (0, 0.2775), atol=1e-4)


# Whole runs


def small_run(script, tmp_path, monkeypatch, **settings):
    monkeypatch.chdir(tmp_path)
    defaults = {"env_id": "Counter-v0", "dataset": "none", "hidden_dim": 32, "chunk_size": 2, "num_envs": 3, "total_timesteps": 600}
    intervals = {"critic_warmup_steps": 300, "eval_interval": 300, "eval_episodes": 10, "log_interval": 100}
    return script.main(script.Args(**(defaults | intervals | settings)))


@both_scripts
def test_pure_online_run_writes_its_outputs_and_is_reproducible(script, tmp_path, monkeypatch):
    files = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        summary = small_run(script, tmp_path / name, monkeypatch)
        (run_dir,) = (tmp_path / name / "runs").iterdir()
        files.append((run_dir / "metrics.csv").read_text())
        assert summary["env_steps"] == 600 and 0 <= summary["final_success"] <= summary["best_success"] <= 1
        assert json.loads((run_dir / "summary.json").read_text())["final_success"] == summary["final_success"]
        assert json.loads((run_dir / "args.json").read_text())["env_id"] == "Counter-v0"
        again = script.main(script.Args(evaluate=run_dir / "policy.pt"))
        assert (again["success"], again["return"]) == (summary["final_success"], summary["final_return"])
        assert (run_dir / "policy_best.pt").is_file() and not list(run_dir.glob("*.tmp"))
    assert files[0] == files[1]
    rows = list(csv.DictReader(files[0].splitlines()))
    assert [int(row["global_step"]) for row in rows] == [0, 102, 201, 300, 402, 501, 600]
    assert [row["eval/success"] != "" for row in rows] == [True, False, False, True, False, False, True]
    assert rows[3]["losses/qf_loss"] != "" and rows[3]["losses/actor_loss"] == "" and rows[4]["losses/actor_loss"] != ""  # warm-up is over


@both_scripts
def test_policy_stays_the_clone_during_the_warm_up(script, tmp_path, monkeypatch):
    small_run(script, tmp_path, monkeypatch, critic_warmup_steps=600)
    (run_dir,) = (tmp_path / "runs").iterdir()
    _, policy, _ = script.load_policy(run_dir / "policy.pt", torch.device("cpu"))
    torch.manual_seed(1)
    fresh, _ = script.make_networks(script.Args(env_id="Counter-v0", chunk_size=2, hidden_dim=32), torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), fresh.parameters(), strict=True))
    assert policy.normalize.mean[0] > 0.5  # statistics of what it met


@both_scripts
def test_nan_observation_stops_the_run_after_saving(script, tmp_path, monkeypatch):
    with pytest.raises(script.RunError, match=r"environment step \d+.* observation"):
        small_run(script, tmp_path, monkeypatch, env_id="CounterNaN-v0", total_timesteps=3000)
    (run_dir,) = (tmp_path / "runs").iterdir()
    _, policy, _ = script.load_policy(run_dir / "policy.pt", torch.device("cpu"))
    assert all(torch.isfinite(parameter).all() for parameter in policy.parameters())
    assert "observation" in json.loads((run_dir / "summary.json").read_text())["stopped"]


@both_scripts
def test_cloning_stops_below_the_success_cap(script, tmp_path, monkeypatch):
    """With success given after 100, 200, ... of 1000 gradient steps as 0.1, 0.2, ..., a cap of 0.25 must keep the weights of step 200."""
    seen = []

    def evaluate(policy, *_):
        seen.append(copy.deepcopy(policy.state_dict()))
        return {"success": len(seen) / 10, "successes": len(seen), "episodes": 10, "return": 0.0}

    monkeypatch.setattr(script, "evaluate", evaluate)
    monkeypatch.setitem(script.SCRIPTED, "Counter", lambda obs: np.zeros(2))
    settings = {"dataset": "scripted", "num_demos": 10, "bc_steps": 1000, "total_timesteps": 3, "best_of_n": 1}
    small_run(script, tmp_path, monkeypatch, bc_success_cap=0.25, **settings)
    assert len(seen) >= 4
    clone = seen[3]  # the evaluation after cloning
    assert all(torch.equal(clone[name], seen[1][name]) for name in clone)
    assert not all(torch.equal(clone[name], seen[2][name]) for name in clone)


def test_no_demonstration_enters_the_online_buffer_of_ogpo(tmp_path, monkeypatch):
    settings = {"dataset": "scripted", "num_demos": 30, "bc_steps": 10, "total_timesteps": 150, "eval_interval": 1000}
    for script, expected in ((poco, True), (ogpo, False)):
        monkeypatch.setitem(script.SCRIPTED, "Counter", lambda obs: np.zeros(2))
        (tmp_path / script.METHOD).mkdir()
        small_run(script, tmp_path / script.METHOD, monkeypatch, **settings)
        (run_dir,) = (tmp_path / script.METHOD / "runs").iterdir()
        last = list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))[-1]
        assert (float(last["charts/buffer_size"]) > 150) == expected


def test_nan_gradient_changes_no_weight_and_the_next_one_does():
    policy = FlowPolicy(2, 2)
    optimizer = torch.optim.Adam(policy.parameters(), fused=True)
    before = [parameter.clone() for parameter in policy.parameters()]
    for value, changes in ((torch.nan, False), (0.5, True)):
        norm = poco.gradient_step(optimizer, policy.bc_loss(torch.full((1, 2), value), torch.ones(1, 2), None).mean())
        assert torch.isfinite(norm) == changes
        assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True)) != changes


@both_scripts
def test_nan_loss_stops_the_run_before_it_reaches_the_weights(script, tmp_path, monkeypatch):
    calls = []

    def critic_loss(q, target, valid, honest=script.critic_loss):
        calls.append(None)
        return honest(q, target, valid) * (torch.nan if len(calls) == 60 else 1.0)

    monkeypatch.setattr(script, "critic_loss", critic_loss)
    with pytest.raises(script.RunError, match=r"environment step \d+: losses/qf_.* became NaN"):
        small_run(script, tmp_path, monkeypatch)
    (run_dir,) = (tmp_path / "runs").iterdir()
    _, _, critic = script.load_policy(run_dir / "policy.pt", torch.device("cpu"))
    assert all(torch.isfinite(parameter).all() for parameter in critic.parameters())


@both_scripts
def test_nan_loss_during_cloning_stops_the_run(script, tmp_path, monkeypatch):
    honest = script.FlowPolicy.bc_loss
    monkeypatch.setattr(script.FlowPolicy, "bc_loss", lambda *args: honest(*args) * torch.nan)
    monkeypatch.setattr(script, "FINAL_EPISODES", 3)
    monkeypatch.setitem(script.SCRIPTED, "Counter", lambda obs: np.zeros(2))
    with pytest.raises(script.RunError, match=r"environment step 0: losses/.* became NaN"):
        small_run(script, tmp_path, monkeypatch, dataset="scripted", num_demos=10, bc_steps=3)
    (run_dir,) = (tmp_path / "runs").iterdir()
    _, policy, _ = script.load_policy(run_dir / "policy.pt", torch.device("cpu"))
    assert all(torch.isfinite(parameter).all() for parameter in policy.parameters())


# The command line, as a user types it


def start(script, *arguments, cwd, **options):
    command = [sys.executable, script.__file__, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def run(script, *arguments, cwd):
    process = start(script, *arguments, cwd=cwd)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


@pytest.fixture(scope="module", params=SCRIPTS.values(), ids=SCRIPTS)
def reach(tmp_path_factory, request):
    """A small run on FetchReach, from a poor clone, of each script."""
    cwd = tmp_path_factory.mktemp("reach")
    settings = "--env-id FetchReach-v4 --num-demos 10 --bc-steps 150 --total-timesteps 2500 --critic-warmup-steps 500 --eval-interval 1000"
    settings += " --eval-episodes 10 --utd-ratio 0.5 --hidden-dim 128"
    code, out, err = run(request.param, *settings.split(), cwd=cwd)
    assert code == 0, err
    (run_dir,) = (cwd / "runs").iterdir()
    return request.param, run_dir, out, json.loads((run_dir / "summary.json").read_text())


def test_reach_improves_on_its_clone(reach):
    _, _, out, summary = reach
    assert summary["final_success"] >= summary["bc_success"] + 0.1
    low, high = summary["final_success_interval"]
    assert low < summary["final_success"] < high or summary["final_success"] == 1
    assert f"success {summary['bc_success']:.2f} ({round(100 * summary['bc_success'])}/100)" in out


def test_the_printed_command_evaluates_to_the_same_result(reach):
    script, run_dir, _, summary = reach
    words = summary["evaluate_again"].split()
    assert words[:2] == ["python", f"{script.METHOD}.py"]
    code, out, err = run(script, *words[2:], cwd=run_dir.parent.parent)
    assert code == 0, err
    assert f"success {summary['final_success']:.2f} (" in out


@pytest.mark.parametrize(("script", "signal_"), [(poco, signal.SIGINT), (ogpo, signal.SIGTERM)])
def test_ctrl_c_and_sigterm_save_print_the_summary_and_exit_130(script, signal_, tmp_path):
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs inherit that it is ignored
    process = start(script, "--env-id", "FetchReach-v4", "--num-demos", 5, "--bc-steps", 20, cwd=tmp_path, preexec_fn=heed)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/policy.pt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)
    process.send_signal(signal_)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "evaluate_again" in out and "bc_success" in out and "--resume" in out
    (run_dir,) = (tmp_path / "runs").iterdir()
    args, _, _ = script.load_policy(run_dir / "policy.pt", torch.device("cpu"))
    assert args.env_id == "FetchReach-v4"


BAD_INPUT = {
    "unknown environment": ("--env-id FetchPickAndPlac-v4", "FetchPickAndPlace-v4"),
    "discrete actions": ("--env-id CartPole-v1 --dataset none", "Discrete"),
    "no demonstrator": ("--env-id Pendulum-v1", "--dataset none"),
    "chunk longer than an episode": ("--env-id FetchReach-v4 --chunk-size 51", "50 steps"),
    "zero size": ("--batch-size 0", "--batch-size"),
    "negative size": ("--num-envs -1", "--num-envs"),
    "no candidates": ("--num-candidates 0", "--num-candidates"),
    "zero temperature": ("--temperature 0", "--temperature"),
    "NaN temperature": ("--temperature nan", "--temperature"),
    "negative clip": ("--clip-threshold -0.1", "--clip-threshold"),
    "discount above one": ("--gamma 1.5", "at most 1"),
    "no demonstrations": ("--num-demos 0", "--dataset none"),
    "unknown option": ("--no-such-option 1", "no-such-option"),
    "render without evaluate": ("--render", "--evaluate"),
    "no such file": ("--evaluate nowhere.pt", "nowhere.pt"),
    "buffer below batch": ("--buffer-size 100", "--batch-size"),
    "buffer beyond memory": (f"--buffer-size {10**13}", "does not fit into memory"),
    "buffer beyond numbers": (f"--buffer-size {10**22}", "does not fit into memory"),
    "cap above one": ("--bc-success-cap 45", "--bc-success-cap"),
    "ogpo: no group": ("--group-size 1", "--group-size must be at least 2"),
    "ogpo: no noise": ("--sigma 0", "--sigma"),
    "ogpo: negative weight": ("--success-coef -1", "--success-coef"),
    "ogpo: unknown reduction": ("--next-reduction max", "median"),
    "ogpo: option of the other script": ("--posterior-coef 1", "posterior-coef"),
}
if not torch.cuda.is_available():
    BAD_INPUT["no CUDA"] = ("--device cuda", "--device cpu")


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_a_sentence_and_status_2(case, tmp_path):
    arguments, hint = BAD_INPUT[case]
    code, _, err = run(ogpo if case.startswith("ogpo") else poco, *arguments.split(), cwd=tmp_path)
    assert code == 2 and hint in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_unwritable_runs_folder(tmp_path):
    (tmp_path / "runs").write_text("a file where the folder should be")
    code, _, err = run(poco, "--env-id", "FetchReach-v4", "--num-demos", 1, cwd=tmp_path)
    assert code == 2 and "runs" in err and "Traceback" not in err
    assert len(list(tmp_path.iterdir())) == 1


def test_policy_file_of_another_environment(reach):
    script, run_dir, _, _ = reach
    code, _, err = run(script, "--evaluate", run_dir / "policy.pt", "--env-id", "FetchPush-v4", cwd=run_dir)
    assert code == 2 and "FetchReach-v4" in err and "FetchPush-v4" in err and "Traceback" not in err


def test_unbounded_actions():
    with pytest.raises(poco.UserError, match="bounded"):
        poco.make_env("NoBounds-v0", 2)


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("code_was_run",))


def test_policy_trained_on_cuda_loads_without_cuda(reach, tmp_path):
    script, run_dir, _, _ = reach
    content = torch.load(run_dir / "policy.pt", weights_only=True)
    torch.save(content | {"args": content["args"] | {"device": "cuda"}}, tmp_path / "policy.pt")
    args, _, _ = script.load_policy(tmp_path / "policy.pt", torch.device("cpu"))
    assert args.env_id == "FetchReach-v4"


def test_policy_trained_with_optional_packages_loads_without_them(reach, tmp_path, monkeypatch):
    script, run_dir, _, _ = reach
    content = torch.load(run_dir / "policy.pt", weights_only=True)
    torch.save(content | {"args": content["args"] | dict.fromkeys(script.OPTIONAL, True)}, tmp_path / "policy.pt")
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    args, _, _ = script.load_policy(tmp_path / "policy.pt", torch.device("cpu"))
    assert args.track and args.cudagraphs
    with pytest.raises(script.UserError, match="CUDA device|pip install"):  # another run with them would need them
        script.check_args(args)


def test_damaged_and_malicious_policy_files(reach, tmp_path, monkeypatch):
    script, run_dir, _, _ = reach
    monkeypatch.chdir(tmp_path)
    whole = (run_dir / "policy.pt").read_bytes()
    content = torch.load(run_dir / "policy.pt", weights_only=True)
    files = {"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello", "pickle": pickle.dumps(Malicious())}
    for name, data in files.items():
        Path(name).write_bytes(data)
    torch.save(content | {"policy": Malicious()}, "torch_pickle")
    torch.save(content | {"method": "sac"}, "other_method")
    torch.save(content | {"args": content["args"] | {"env_id": "FetchPush-v4"}}, "other_shapes")
    torch.save(content | {"args": content["args"] | {"hidden_dim": -5}}, "bad_args")
    torch.save([1, 2], "not_a_dict")
    for name in (*files, "torch_pickle", "other_method", "other_shapes", "bad_args", "not_a_dict"):
        with pytest.raises(script.UserError, match=name):
            script.load_policy(Path(name), torch.device("cpu"))
    assert not Path("code_was_run").exists()


# Nothing lost


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


def killed_run(script, cwd, monkeypatch, after, **settings):
    """Stops a small run when this many files have been written. Returns: its folder."""
    written = []

    def write_file(path, data, honest=script.write_file):
        written.append(path)
        if len(written) > after:
            path.with_suffix(".tmp").write_bytes(bytes(data)[: len(data) // 2])
            raise Killed
        honest(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(script, "write_file", write_file)
        try:
            small_run(script, cwd, patch, **settings)
        except Killed:
            killed = True
        else:
            killed = False
    gc.collect()  # lets go of the lock, as the end of a process does
    (run_dir,) = (cwd / "runs").iterdir()
    return run_dir, killed


RESUMABLE = {"total_timesteps": 240, "checkpoint_interval": 90, "critic_warmup_steps": 60, "eval_interval": 120, "eval_episodes": 2}


@both_scripts
def test_a_run_killed_in_a_write_and_resumed_ends_as_the_undisturbed_run(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "FINAL_EPISODES", 3)
    monkeypatch.setitem(script.SCRIPTED, "Counter", lambda obs: np.zeros(2))
    settings = RESUMABLE | {"dataset": "scripted", "num_demos": 5, "bc_steps": 5, "hidden_dim": 8, "batch_size": 16}
    (tmp_path / "whole").mkdir()
    whole, _ = killed_run(script, tmp_path / "whole", monkeypatch, 10**9, **settings)
    kills = 0
    for after in itertools.count(3):  # args.json and the two tables come first
        cwd = tmp_path / str(after)
        cwd.mkdir()
        run_dir, killed = killed_run(script, cwd, monkeypatch, after, **settings)
        if not killed:
            break
        kills += 1
        (saved,) = [script.resumed_args(script.Args(resume=run_dir), [])]
        script.main(saved)
        assert (run_dir / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
        for name in ("policy.pt", "policy_best.pt", "checkpoint.pt"):
            a, b = (torch.load(folder / name, weights_only=True) for folder in (run_dir, whole))
            for part in ("policy", "critic") if "policy" in a else ():
                assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    assert kills >= 8


def test_the_kill_sweep_in_short(tmp_path):
    command = [sys.executable, Path(__file__).parent / "benchmark/kill_sweep.py", "--kills", "5", "--scripts", "poco"]
    result = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=600, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "5 of 5 resumed, 5 of 5 ended as the undisturbed run" in result.stdout


def test_a_finished_run_can_be_made_longer_and_nothing_else(reach):
    script, run_dir, _, summary = reach
    cwd = run_dir.parent.parent
    code, _, err = run(script, "--resume", run_dir.relative_to(cwd), "--gamma", "0.5", cwd=cwd)
    assert code == 2 and "--gamma" in err and "0.5" in err and str(script.Args().gamma) in err
    assert json.loads((run_dir / "summary.json").read_text()) == summary
    rows = (run_dir / "metrics.csv").read_text().splitlines()
    code, _, err = run(script, "--resume", run_dir.relative_to(cwd), "--total-timesteps", "2700", cwd=cwd)
    assert code == 0, err
    assert (run_dir / "metrics.csv").read_text().splitlines()[: len(rows)] == rows
    assert json.loads((run_dir / "summary.json").read_text())["env_steps"] == 2700


def test_resume_wants_a_run_that_has_ended(tmp_path):
    code, _, err = run(poco, "--resume", "nowhere", cwd=tmp_path)
    assert code == 2 and "nowhere" in err and "Traceback" not in err
    process = start(poco, "--env-id", "FetchReach-v4", "--num-demos", 5, "--bc-steps", 20, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/wall_time.csv")) and time.monotonic() < deadline:
        time.sleep(0.1)
    (run_dir,) = (tmp_path / "runs").iterdir()
    code, _, err = run(poco, "--resume", run_dir, cwd=tmp_path)
    process.kill()
    process.communicate()
    assert code == 2 and "still going on" in err and "Traceback" not in err


def test_runs_that_begin_in_the_same_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    times = iter(["12", "12", "13"])
    monkeypatch.setattr(poco.time, "strftime", lambda form: next(times))
    first, second = (poco.RunLog(Args(), 0.0, None) for _ in range(2))
    assert first.dir != second.dir and second.dir.name.endswith("13")


@both_scripts
def test_a_full_disk_ends_with_a_sentence_and_the_last_checkpoint(script, tmp_path):
    options = "--env-id Pendulum-v1 --dataset none --hidden-dim 16 --total-timesteps 3000 --checkpoint-interval 1000 --utd-ratio 0.01"
    full = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (135_000, 135_000))  # no file can be larger; checkpoints grow
    process = start(script, *options.split(), "--eval-interval", 10**6, cwd=tmp_path, preexec_fn=full)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 1 and "environment step" in err and "too large" in err and "Traceback" not in err
    (run_dir,) = (tmp_path / "runs").iterdir()
    stopped = json.loads((run_dir / "summary.json").read_text())["env_steps"]
    saved = script.read_file(run_dir / "checkpoint.pt", torch.device("cpu"))[1]["ranks"][0]["progress"]["env_steps"]
    assert saved == stopped - 1000 and f"--resume runs/{run_dir.name}" in out


@both_scripts
def test_lost_write_permission_ends_with_a_sentence(script, tmp_path, monkeypatch):
    def write_file(path, data, honest=script.write_file):
        if path.name == "policy.pt" and (path.parent / "checkpoint.pt").exists():
            raise PermissionError(13, "Permission denied", str(path))
        honest(path, data)

    monkeypatch.setattr(script, "write_file", write_file)
    with pytest.raises(script.RunError, match="Permission denied"):
        small_run(script, tmp_path, monkeypatch)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return len(a) == len(b) and all(map(same, a, b)) if isinstance(a, (list, tuple)) else a == b or (math.isnan(a) and math.isnan(b))


def test_truncated_and_flipped_checkpoints_are_refused_or_harmless(reach, tmp_path):
    script, run_dir, _, _ = reach
    whole, rng = bytearray((run_dir / "checkpoint.pt").read_bytes()), np.random.default_rng(0)
    _, content = script.read_file(run_dir / "checkpoint.pt", torch.device("cpu"))
    damaged = [whole[:n] for n in rng.integers(0, len(whole), 20)]
    for _ in range(200):
        flipped = whole.copy()
        for position in rng.integers(0, len(whole), rng.integers(1, 9)):
            flipped[position] ^= rng.integers(1, 256)
        damaged.append(flipped)
    refused = 0
    for data in damaged:
        (tmp_path / "checkpoint.pt").write_bytes(data)
        try:
            _, loaded = script.read_file(tmp_path / "checkpoint.pt", torch.device("cpu"))
        except script.UserError as error:
            assert "checkpoint.pt" in str(error)
            refused += 1
        else:
            assert same(content, loaded)  # the flip fell into a gap between the records
    assert refused > 190
    code, _, err = run(script, "--resume", tmp_path, cwd=tmp_path)
    assert code == 2 and "Traceback" not in err and (tmp_path / "checkpoint.pt").read_bytes() == damaged[-1]


def test_a_checkpoint_of_another_shape_leaves_the_folder_as_it_is(reach, tmp_path):
    script, run_dir, _, _ = reach
    shutil.copytree(run_dir, tmp_path / "run")
    content = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    for changed in ({"hidden_dim": 32}, {"env_id": "FetchPush-v4"}):
        torch.save(content | {"args": content["args"] | changed}, tmp_path / "run/checkpoint.pt")
        before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
        code, _, err = run(script, "--resume", "run", cwd=tmp_path)
        assert code == 2 and "does not fit" in err and "Traceback" not in err
        assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_malicious_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "method": "poco", "args": Malicious()}, "checkpoint.pt")
    with pytest.raises(poco.UserError, match=r"checkpoint\.pt"):
        poco.resumed_args(Args(resume=Path()), [])
    assert not Path("code_was_run").exists()


def test_checkpoint_of_the_default_run_is_small(tmp_path):
    args = Args()
    policy, critic = poco.make_networks(args, torch.device("cpu"))
    buffer = poco.make_buffer(policy, args, torch.device("cpu"))
    for seed in range(500):
        buffer.add_episode(Trajectory(np.zeros((51, 31)), np.zeros((50, 4)), np.zeros(50), False, 0.0, seed))
    networks = {"policy": policy.state_dict(), "critic": critic.state_dict(), "target": copy.deepcopy(critic.state_dict())}
    poco.save_file(tmp_path / "checkpoint.pt", args, networks | {"adam": [networks, networks], "buffer": buffer.state_dict()})
    assert buffer.size == 25_000 and (tmp_path / "checkpoint.pt").stat().st_size < 30e6


class Raising(Counter):
    def step(self, action):
        if self.t == 2 and self.end == 8:
            raise ConnectionError("the robot does not answer")
        return super().step(action)


class OneStep(Counter):
    def step(self, action):
        obs, reward, _, _, info = super().step(action)
        return obs, reward, True, False, info


gym.register("CounterRaising-v0", Raising)
gym.register("CounterOneStep-v0", OneStep)


@both_scripts
def test_environment_that_raises_or_ends_at_once(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "evaluate", lambda *_: {"success": 0.0, "successes": 0, "episodes": 1, "return": 0.0})
    for env_id, words in (("CounterRaising-v0", "ConnectionError: the robot does not"), ("CounterOneStep-v0", "before a chunk of 2 steps")):
        (tmp_path / env_id).mkdir()
        with pytest.raises(script.RunError, match=rf"environment step \d+: .*{words}"):
            small_run(script, tmp_path / env_id, monkeypatch, env_id=env_id)
        (run_dir,) = (tmp_path / env_id / "runs").iterdir()
        assert {"policy.pt", "checkpoint.pt", "summary.json"} <= {path.name for path in run_dir.iterdir()}


# Several processes

RANK = """
import sys, torch, torch.distributed as dist
sys.path.insert(0, sys.argv[2])
script = __import__(sys.argv[1])

# two ranks with half the batch each give the gradient of the whole batch
torch.manual_seed(0)
make, n = script.FlowPolicy, 64
data = [torch.randn(n, d) for d in (3, 4, 4)] + [torch.rand(n, 1)]
policy, alone = make(3, 4), make(3, 4)
alone.load_state_dict(policy.state_dict())
adam = [torch.optim.Adam(network.parameters(), fused=True) for network in (policy, alone)]
alone.normalize.fit(data[0])
norm = script.gradient_step(adam[1], alone.bc_loss(data[0], data[1], None, *data[2:]).mean())
dist.init_process_group("gloo")
half = [column[dist.get_rank() * n // 2 :][: n // 2] for column in data]
policy.normalize.fit(half[0])
for name in ("mean", "std"):
    torch.testing.assert_close(getattr(policy.normalize, name), getattr(alone.normalize, name))
averaged = script.gradient_step(adam[0], policy.bc_loss(half[0], half[1], None, *half[2:]).mean())
torch.testing.assert_close(averaged, norm)
for a, b in zip(policy.parameters(), alone.parameters()):
    torch.testing.assert_close(a.grad, b.grad)
rank = dist.get_rank()

# a whole run: what all ranks must agree on
networks = []
honest = script.make_networks
script.make_networks = lambda *args: networks.append(honest(*args)) or networks[-1]
small = dict(env_id="Pendulum-v1", dataset="none", hidden_dim=16, num_envs=2, total_timesteps=1600, critic_warmup_steps=900)
small |= dict(eval_interval=10**6, eval_episodes=1, num_critics=2, checkpoint_interval=1200)
script.FINAL_EPISODES = 1
script.main(script.Args(**small))
torch.save([list(map(torch.Tensor.detach, network.parameters())) + [network.normalize.std] for network in networks[0]], f"rank{rank}.pt")
"""


def test_two_ranks_stay_equal_and_their_gradient_is_that_of_both_batches(tmp_path, script=ogpo):
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "rank.py", script.METHOD]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    folder = str(Path(script.__file__).parent)
    result = subprocess.run([*command, folder], cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert all(torch.equal(a, b) for network in zip(first, second, strict=True) for a, b in zip(*network, strict=True))
    (run_dir,) = (tmp_path / "runs").iterdir()  # rank 1 writes nothing
    assert json.loads((run_dir / "summary.json").read_text())["env_steps"] == 1600
    last = list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))[-1]
    assert float(last["losses/actor_loss"]) == float(last["losses/actor_loss"])  # it learned, and no NaN came


# Speed without another meaning


def test_bfloat16_gives_nearly_the_same_update(monkeypatch):
    losses = {}
    for hardware in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda hardware=hardware: {"amx_bf16": hardware})
        torch.manual_seed(0)
        args = Args(chunk_size=2, num_candidates=4)
        policy, critic = FlowPolicy(3, 4), CriticEnsemble(3, 4, 2)
        batch = poco.Batch(torch.randn(64, 3), torch.randn(64, 4), torch.randn(64), torch.randn(64, 3), torch.zeros(64), torch.ones(64, 2))
        adam = [torch.optim.Adam(network.parameters(), fused=True) for network in (policy, critic)]
        losses[hardware] = poco.update_critic(policy, critic, copy.deepcopy(critic), adam[1], batch, args)
        losses[hardware] |= poco.update_policy(policy, critic, adam[0], batch, args)
        assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in policy.parameters())
    assert any(losses[True][name] != losses[False][name] for name in losses[True])
    for name in ("losses/qf_loss", "losses/actor_loss", "losses/actor_grad_norm", "losses/effective_samples"):
        assert losses[True][name].item() == pytest.approx(losses[False][name].item(), rel=0.03)


@pytest.mark.parametrize("sigma", [0.16, 1.0])
def test_bfloat16_keeps_the_ratio_of_chain_probabilities(monkeypatch, sigma):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    torch.manual_seed(0)
    old_policy, obs, device = ogpo.FlowPolicy(3, 8), torch.randn(512, 3), torch.device("cpu")
    policy, (vector,) = copy.deepcopy(old_policy), torch.randn(1, 8)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-4, fused=True)
    for _ in range(3):
        ogpo.gradient_step(optimizer, policy.bc_loss(obs, vector.expand(512, -1).clamp(-1, 1), None).mean())
    with torch.no_grad():
        with ogpo.mixed_precision(ogpo.Args(), device):
            chain, old_log_prob = ogpo.sample_chain(old_policy, obs, sigma)
            unmoved = (ogpo.chain_log_prob(old_policy, obs, chain, sigma) - old_log_prob).exp()
            ratio = (ogpo.chain_log_prob(policy, obs, chain, sigma) - old_log_prob).exp()
        exact = (ogpo.chain_log_prob(policy, obs, chain, sigma) - ogpo.chain_log_prob(old_policy, obs, chain, sigma)).exp()
    assert (unmoved - 1).abs().max() < 1e-4
    assert 0 < (ratio - exact).std() < 0.1 * exact.std()


def test_blocks_of_rows_change_nothing():
    rows = 5000  # more than two blocks
    policy, critic = FlowPolicy(3, 4, hidden_dim=16), CriticEnsemble(3, 4, 2, hidden_dim=16)
    obs, x, t = torch.randn(rows, 3), torch.randn(rows, 4), torch.rand(rows, 1)
    values = policy.velocity(obs, x, t), critic(obs, x)
    hidden = critic.net(torch.cat([obs, x], dim=1).expand(2, -1, -1))  # as no statistics were fitted
    whole = policy.net(torch.cat([obs, x, t], dim=1)), critic.head(hidden).squeeze(2)
    for network, value, expected in zip((policy, critic), values, whole, strict=True):
        torch.testing.assert_close(value, expected)
        gradients = [torch.autograd.grad(v.square().mean(), network.parameters()) for v in (value, expected)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_compiled_updates_are_the_same(tmp_path, monkeypatch, script=ogpo):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))  # traced, but no compiler is needed
    monkeypatch.setattr(script, "FINAL_EPISODES", 3)
    rows = []
    for compiled in (False, True):
        (tmp_path / str(compiled)).mkdir()
        settings = {"compile": compiled, "total_timesteps": 402, "critic_warmup_steps": 380, "batch_size": 32, "hidden_dim": 8}
        small_run(script, tmp_path / str(compiled), monkeypatch, **settings)
        (run_dir,) = (tmp_path / str(compiled) / "runs").iterdir()
        rows.append(list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))[-1])
    for name in rows[0]:
        assert rows[0][name] == rows[1][name] == "" or float(rows[1][name]) == pytest.approx(float(rows[0][name]), rel=1e-3)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux")
def test_a_buffer_takes_up_no_memory_before_it_is_filled():
    def resident():  # MB
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    before = resident()
    buffer = ReplayBuffer(1_000_000, 28, 4, 5, 0.98)
    assert sum(column.nbytes for column in buffer.columns) == 256_000_000
    assert resident() - before < 30
    buffer.obs[:] = 1  # so that this test can fail
    assert resident() - before > 100


class NoWaiting(TorchDispatchMode):
    """Fails on operations that read values back from the device, which a GPU's queue would have to be emptied for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        assert func.overloadpacket not in (aten._local_scalar_dense, aten.nonzero, aten.masked_select), func
        assert func != aten.normal.Tensor_Tensor  # its kernel looks whether each deviation is positive
        masks = args[1] if func.overloadpacket in (aten.index, aten.index_put_) else ()
        assert not any(mask is not None and mask.dtype == torch.bool for mask in masks), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_updates_never_wait_for_the_device(script):
    for waiting in (lambda x: x.item(), lambda x: bool(x.sum() > 0), lambda x: x[x > 0], lambda x: torch.normal(x, x)):
        with pytest.raises(AssertionError), NoWaiting():
            waiting(torch.ones(1))
    args = script.Args(batch_size=32, **({"chi2_coef": 0.1, "next_samples": 2} if script is ogpo else {}))
    policy, critic = script.FlowPolicy(3, 20), script.CriticEnsemble(3, 20, args.num_critics)
    adam = [torch.optim.Adam(network.parameters(), fused=True) for network in (policy, critic)]
    followers = [copy.deepcopy(policy) for _ in range(2 * (script is ogpo))]
    buffer = script.ReplayBuffer(100, 3, 4, args.chunk_size, args.gamma)
    buffer.add_episode(Trajectory(np.ones((51, 3)), np.zeros((50, 4)), np.ones(50), True, 1.0, 0))
    for _ in range(2):
        start, target = buffer.draw(args.batch_size), copy.deepcopy(critic)
        with NoWaiting():
            batches = [buffer.windows(start)] * (1 + (script is ogpo))
            script.update_critic(policy, critic, target, adam[1], batches[0], args)
            script.update_policy(policy, *followers, target, adam[0], *batches, args)


def test_cudagraphs_take_the_updates_and_want_a_gpu(monkeypatch):
    with pytest.raises(poco.UserError, match="no CUDA device"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        poco.check_args(Args(cudagraphs=True))
    pytest.importorskip("tensordict")
    with pytest.warns(UserWarning, match="without CUDA"):  # there it passes every call through
        update = poco.accelerate(lambda start: {"losses/actor_loss": start.sum()}, Args(cudagraphs=True))
    assert [update(torch.full((2,), float(i)))["losses/actor_loss"].item() for i in range(6)] == [0, 2, 4, 6, 8, 10]


# Another policy


class DDPMPolicy(torch.nn.Module):
    """Denoising diffusion over chunks with epsilon prediction. POCO asks of a policy only bc_loss and sample."""

    def __init__(self, obs_dim, chunk_dim, hidden_dim=64, num_steps=10):
        super().__init__()
        self.chunk_dim, self.num_steps = chunk_dim, num_steps
        angle = torch.linspace(0, 1, num_steps + 1).add(0.008).div(1.008).mul(np.pi / 2)  # cosine schedule
        self.register_buffer("alpha_bar", (torch.cos(angle) ** 2 / torch.cos(angle[0]) ** 2).clamp(1e-4, 1))
        layers = [torch.nn.Linear(obs_dim + chunk_dim + 1, hidden_dim), torch.nn.SiLU(), torch.nn.Linear(hidden_dim, hidden_dim)]
        self.net = torch.nn.Sequential(*layers, torch.nn.SiLU(), torch.nn.Linear(hidden_dim, chunk_dim))

    def epsilon(self, obs, x, k):
        return self.net(torch.cat([obs, x, k / self.num_steps], dim=1))

    def bc_loss(self, obs, chunk, valid, noise=None, time=None):
        noise = torch.randn_like(chunk) if noise is None else noise
        k = torch.randint(1, self.num_steps + 1, (len(chunk), 1)) if time is None else (time * self.num_steps).long().clamp(min=1)
        alpha_bar = self.alpha_bar[k]
        x = alpha_bar.sqrt() * chunk + (1 - alpha_bar).sqrt() * noise
        error = (self.epsilon(obs, x, k) - noise) ** 2
        if valid is None:
            return error.mean(1)
        mask = valid.repeat_interleave(chunk.shape[1] // valid.shape[1], dim=1)
        return (error * mask).sum(1) / mask.sum(1).clamp(min=1)

    def sample(self, obs, noise=None):
        x = torch.randn(len(obs), self.chunk_dim) if noise is None else noise
        for step in range(self.num_steps, 0, -1):
            alpha_bar, before = self.alpha_bar[step], self.alpha_bar[step - 1]
            epsilon = self.epsilon(obs, x, torch.full((len(obs), 1), step))
            chunk = ((x - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()).clamp(-1, 1)
            alpha = alpha_bar / before
            mean = (before.sqrt() * (1 - alpha) * chunk + alpha.sqrt() * (1 - before) * x) / (1 - alpha_bar)
            x = mean + ((1 - alpha) * (1 - before) / (1 - alpha_bar)).sqrt() * torch.randn_like(x)  # zero at the last step
        return x


def test_poco_trains_a_ddpm_policy():
    settings = {"clip_threshold": 5.0, "posterior_coef": 3.0, "policy": DDPMPolicy(1, 1)}
    assert two_mode_bandit(temperature=0.05, **settings)[0] > 0.45


# Data


def episodes_equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for name in ("obs", "actions", "rewards"):
            np.testing.assert_allclose(getattr(x, name), getattr(y, name), atol=1e-6)
        assert x.terminated == y.terminated and (x.success == y.success or np.isnan(x.success + y.success))


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Six episodes of Counter, and the file that --save-dataset writes of them."""
    monkeypatch.setitem(poco.SCRIPTED, "Counter", lambda obs: np.array([0.25, -0.5]))
    args = Args(env_id="Counter-v0", chunk_size=2, num_demos=6, save_dataset=tmp_path / "data.npz", dataset=str(tmp_path / "data.npz"))
    episodes = poco.make_demonstrations(args)
    poco.write_dataset(args, episodes)
    with np.load(args.save_dataset) as file:
        return args, episodes, dict(file)


def test_saved_demonstrations_load_as_they_were(recorded):
    args, episodes, data = recorded
    episodes_equal(poco.load_dataset(args), episodes)
    assert data["actions"][:, 0].min() >= 0 and data["actions"][:, 1].max() <= 4  # in the environment's own range


def test_without_next_observations_a_time_limit_costs_one_step(recorded):
    args, episodes, data = recorded
    del data["next_observations"]
    np.savez(args.dataset, **data)
    for loaded, whole in zip(poco.load_dataset(args), episodes, strict=True):
        n = len(whole.actions) - (not whole.terminated)
        assert len(loaded.actions) == n and len(loaded.obs) == n + 1
        np.testing.assert_allclose(loaded.obs[:n], whole.obs[:n], atol=1e-6)


def test_short_episodes_are_skipped_and_counted(recorded, capsys):
    args, episodes, _ = recorded
    lengths = [len(episode.actions) for episode in episodes]
    args.chunk_size = max(lengths)
    assert len(poco.load_dataset(args)) == lengths.count(max(lengths))
    assert f"{6 - lengths.count(max(lengths))} of 6 episodes" in capsys.readouterr().out


def test_success_at_any_step_of_the_data(recorded):
    args, _, data = recorded
    data["success"] = np.zeros(len(data["rewards"]))
    data["success"][0] = 1
    np.savez(args.dataset, **data)
    assert sum(episode.success for episode in poco.load_dataset(args)) == 0
    args.success_at = "any"
    assert [episode.success for episode in poco.load_dataset(args)] == [1, 0, 0, 0, 0, 0]


WRONG_DATA = {
    "missing key": (lambda d: d.pop("rewards"), "lacks rewards"),
    "unequal lengths": (lambda d: d.update(rewards=d["rewards"][1:]), "unequal lengths"),
    "NaN": (lambda d: d["observations"].__setitem__((7, 0), np.nan), r"NaN or infinity in observations, first in row \[7\]"),
    "infinite action": (lambda d: d["actions"].__setitem__((3, 0), np.inf), r"actions, first in row \[3\]"),
    "observation width": (lambda d: d.update(observations=d["observations"][:, :2]), "observations of width 2; Counter-v0 has 3"),
    "action width": (lambda d: d.update(actions=d["actions"][:, :1]), "actions of width 1; Counter-v0 has 2"),
    "actions outside": (lambda d: d["actions"].__setitem__((slice(2), 0), 11.5), "2 of .* actions outside .* by up to 1.5"),
    "no end": (lambda d: d.update(terminals=0 * d["terminals"], timeouts=0 * d["timeouts"]), "marks no end"),
    "all too short": (lambda d: d.update(timeouts=np.ones(len(d["rewards"]), bool)), "no episode of --chunk-size 2"),
    "objects": (lambda d: d.update(rewards=np.array([Malicious()] * len(d["rewards"]))), "Python objects"),
    "text": (lambda d: d.update(rewards=d["rewards"].astype(str)), "instead of numbers"),
    "no rows": (lambda d: d.update({key: column[:0] for key, column in d.items()}), "no rows"),
    "scalar": (lambda d: d.update(rewards=np.float64(1)), "unequal lengths"),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_wrong_data_gets_a_sentence(case, recorded, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, _, data = recorded
    change, words = WRONG_DATA[case]
    change(data)
    np.savez(args.dataset, **data)
    with pytest.raises(poco.UserError, match=words):
        poco.load_dataset(args)
    assert not Path("code_was_run").exists()


def test_files_that_are_no_data(tmp_path):
    for name, content in (("text.npz", b"hello"), ("pickle.npz", pickle.dumps(Malicious())), ("empty.npz", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(poco.UserError, match=name):
            poco.load_dataset(Args(env_id="Counter-v0", dataset=str(tmp_path / name)))
    with pytest.raises(poco.UserError, match=r"no file .*nowhere\.npz"):
        poco.load_dataset(Args(env_id="Counter-v0", dataset="nowhere.npz"))
    assert not Path("code_was_run").exists()


def test_dataset_from_a_file_on_the_command_line(tmp_path):
    small = "--env-id FetchReach-v4 --num-demos 6 --bc-steps 20 --total-timesteps 200 --hidden-dim 32 --eval-interval 1000000".split()
    code, out, err = run(poco, *small, "--save-dataset", "demos.npz", cwd=tmp_path)
    assert code == 0, err
    code, again, err = run(poco, *small, "--dataset", "demos.npz", cwd=tmp_path)
    assert code == 0, err
    line = [line for line in out.splitlines() if line.startswith("demonstrations: 6 episodes")]
    assert line and line[0] in again


class SuccessFromTheStart(gym.Wrapper):
    """Minari wants the same info from reset as from step."""

    def reset(self, **kwargs):
        return self.env.reset(**kwargs)[0], {"success": False}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", ["AdroitHandDoor-v1", "FrankaKitchen-v1"])
def test_minari_dataset(env_id, tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    adroit = env_id.startswith("Adroit")
    collector = minari.DataCollector(SuccessFromTheStart(gym.make(env_id, max_episode_steps=12)), record_infos=adroit)
    rng, recorded = np.random.default_rng(0), []
    for seed in range(3):
        obs, steps, ended = [collector.reset(seed=seed)[0]], [], False
        while not ended:
            action = rng.uniform(-1, 1, collector.action_space.shape).astype(collector.action_space.dtype)
            o, reward, terminated, truncated, _ = collector.step(action)
            obs.append(o)
            steps.append((action, reward))
            ended = terminated or truncated
        flat = [gym.spaces.flatten(collector.unwrapped.observation_space, o) for o in obs]
        recorded.append(Trajectory(np.array(flat), *map(np.array, zip(*steps, strict=True)), False, 0.0, 0))
    collector.create_dataset(dataset_id="test/own-v0", algorithm_name="random", author="a", author_email="a@b.c", code_permalink="-")
    args = Args(env_id=env_id, dataset="test/own-v0", chunk_size=5)
    episodes = poco.load_dataset(args)
    assert [len(episode.actions) for episode in episodes] == [12, 12, 12]
    success = 0.0 if adroit else np.nan
    episodes_equal(episodes, [episode._replace(success=success) for episode in recorded])
    with pytest.raises(poco.UserError, match="width|cannot be read"):
        poco.load_dataset(Args(env_id="FetchReach-v4", dataset="test/own-v0"))
    with pytest.raises(poco.UserError, match="nothing/here-v0"):
        poco.load_dataset(Args(env_id=env_id, dataset="nothing/here-v0"))


def test_without_minari_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr(poco.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(poco.UserError, match=r'pip install "minari\[hdf5\]"'):
        poco.load_dataset(Args(env_id="FetchReach-v4", dataset="some/data-v0"))
    for option, package in (("tensorboard", "tensorboard"), ("track", "wandb"), ("capture_video", "moviepy")):
        with pytest.raises(poco.UserError, match=f"pip install {package}"):
            poco.check_args(Args(**{option: True}))


# Environments of all families

FAMILIES = {
    "FetchReach-v4": False, "AdroitHandDoor-v1": False, "AdroitHandRelocateSparse-v1": False, "FrankaKitchen-v1": False,
    "HandReach-v3": False, "HandManipulateBlock-v1": False, "HandManipulateEgg_ContinuousTouchSensors-v1": False,
    "PointMaze_UMaze-v3": False, "AntMaze_UMaze-v5": False, "Pendulum-v1": True,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", FAMILIES)
def test_environment_families_report_success_or_not(env_id):
    env = poco.make_env(env_id, 2)
    obs, _ = env.reset(seed=0)
    obs, _, _, _, info = env.step(np.zeros(env.action_space.shape, np.float32))
    assert obs.shape == env.observation_space.shape and obs.ndim == 1
    assert np.isnan(info["success"]) == FAMILIES[env_id] and info["success"] != 1
    assert np.isnan(info["tasks"]) == (not env_id.startswith("FrankaKitchen"))


class KitchenLike(Counter):
    """Completes one of its two tasks at the third step, the other at the sixth."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.goal = {"kettle": 0, "microwave": 0}

    def step(self, action):
        *step, _ = super().step(action)
        return *step, {"episode_task_completions": ["kettle", "microwave"][: self.t // 3]}


class Passing(Counter):
    def step(self, action):
        *step, _ = super().step(action)
        return *step, {"success": self.t == 2}


gym.register("KitchenLike-v0", KitchenLike)
gym.register("Passing-v0", Passing)


def test_kitchen_succeeds_when_all_tasks_are_done_and_says_how_many():
    args = Args(env_id="KitchenLike-v0", chunk_size=2, num_envs=2)
    networks = poco.make_networks(args, torch.device("cpu"))
    result = poco.evaluate(*networks, args, 1, 20)
    ends = [len(episode.actions) for episode in poco.collect_episodes(args, lambda obs: np.zeros((len(obs), 4)), 2, range(20))]
    assert result["success"] == np.mean([end >= 6 for end in ends]) and result["tasks"] == np.mean([end // 3 for end in ends])
    assert f"{result['tasks']:.2f} tasks" in poco.result_line(result)


def test_success_at_the_end_or_at_any_step():
    for success_at, expected in (("end", 0.0), ("any", 1.0)):
        args = Args(env_id="Passing-v0", chunk_size=2, success_at=success_at)
        assert poco.evaluate(*poco.make_networks(args, torch.device("cpu")), args, 1, 8)["success"] == expected
    env = poco.make_env("Pendulum-v1", 2, "any")
    env.reset(seed=0)
    assert np.isnan(env.step(np.zeros(1))[-1]["success"])  # not reported stays not reported


def test_environment_of_another_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_module.py").write_text("import gymnasium\ngymnasium.register('Own-v0', 'test_poco:Counter')\n")
    assert poco.make_env("own_module:Own-v0", 2).observation_space.shape == (3,)
    for env_id in ("own_module:Other-v0", "no_such_module:Own-v0"):
        with pytest.raises(poco.UserError, match=env_id):
            poco.make_env(env_id, 2)


class Scaled(Counter):
    def __init__(self, factor=1.0, **kwargs):
        super().__init__(**kwargs)
        self.factor = factor

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, self.factor * reward, *rest


gym.register("Scaled1-v0", Scaled)
gym.register("Scaled1024-v0", Scaled, kwargs={"factor": 1024.0})


@both_scripts
def test_the_reward_scale_does_not_matter(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "FINAL_EPISODES", 5)
    settings = {"total_timesteps": 300, "critic_warmup_steps": 150, "chunk_size": 2, "batch_size": 32}
    weights, rows = [], []
    for env_id in ("Scaled1-v0", "Scaled1024-v0"):
        (tmp_path / env_id).mkdir()
        small_run(script, tmp_path / env_id, monkeypatch, env_id=env_id, **settings)
        (run_dir,) = (tmp_path / env_id / "runs").iterdir()
        weights.append(list(script.load_policy(run_dir / "policy.pt", torch.device("cpu"))[1].parameters()))
        rows.append(list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))[-1])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))
    assert float(rows[1]["charts/episodic_return"]) == 1024 * float(rows[0]["charts/episodic_return"])


# Tracking and pictures


@both_scripts
def test_tensorboard_and_wandb_get_what_metrics_csv_gets(script, tmp_path, monkeypatch):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr(script, "FINAL_EPISODES", 3)
    small_run(script, tmp_path, monkeypatch, tensorboard=True, track=True)
    (run_dir,) = (tmp_path / "runs").iterdir()
    events = event_accumulator.EventAccumulator(str(run_dir))
    events.Reload()
    rows = list(csv.DictReader((run_dir / "metrics.csv").read_text().splitlines()))
    for name in ("eval/success", "charts/episodic_return", "losses/qf_loss", "losses/actor_loss"):
        written = [(int(row["global_step"]), float(row[name])) for row in rows if row[name]]
        assert [(event.step, pytest.approx(event.value, rel=1e-5)) for event in events.Scalars(name)] == written and written
    assert list(run_dir.glob("wandb/offline-run-*"))


@pytest.mark.skipif(not os.environ.get("MUJOCO_GL"), reason="pictures need MUJOCO_GL=egl or osmesa")
def test_capture_video(tmp_path, monkeypatch):
    pytest.importorskip("moviepy")
    monkeypatch.setattr(poco, "FINAL_EPISODES", 3)
    settings = {"env_id": "FetchReach-v4", "total_timesteps": 8, "num_envs": 4, "chunk_size": 5}
    small_run(poco, tmp_path, monkeypatch, capture_video=True, **settings)
    (run_dir,) = (tmp_path / "runs").iterdir()
    for folder in ("step0", "step8"):
        videos = list((run_dir / "videos" / folder).glob("*.mp4"))
        assert len(videos) == 3 and all(video.stat().st_size > 1000 for video in videos)


def test_video_without_a_way_to_render(monkeypatch):
    monkeypatch.setattr(poco, "make_env", lambda *_: 1 / 0)
    with pytest.raises(poco.UserError, match="MUJOCO_GL=egl"):
        poco.check_rendering(Args())


# Fuzzing

NUMBERS = [
    "-1",
    "0",
    "1",
    "2",
    "7",
    "0.5",
    "1e-9",
    "1e18",
    "99999999999999999999",
    "nan",
    "inf",
    "-inf",
    "",
    "x",
    "None",
    "True",
    "1,2",
    "é",
]
SLOW_IF_LARGE = {"num_envs", "num_demos", "bc_steps", "total_timesteps", "eval_episodes", "torch_threads"}


@both_scripts
def test_fuzzed_command_lines_end_in_success_or_a_sentence(script, capsys):
    hypothesis = pytest.importorskip("hypothesis")
    names = [name for name in script.Args.__dataclass_fields__ if name not in ("evaluate", "resume", "track", "tensorboard")]
    option = hypothesis.strategies.tuples(
        hypothesis.strategies.sampled_from(names), hypothesis.strategies.sampled_from(NUMBERS) | hypothesis.strategies.text(max_size=4)
    )

    @hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
    @hypothesis.given(hypothesis.strategies.lists(option, min_size=1, max_size=3))
    def parse(options):
        line = [f"--{name.replace('_', '-')}={value}" for name, value in options]
        try:
            args = script.tyro.cli(script.Args, args=["--env-id=Counter-v0", *line])
            script.check_args(args)
            if args.dataset not in ("scripted", "none"):
                script.load_dataset(args)
            script.make_buffer(script.make_networks(args, torch.device("cpu"))[0], args, torch.device("cpu"))
        except script.UserError as error:
            assert "\n" not in str(error)
        except SystemExit as stop:  # tyro's own sentence
            assert stop.code == 2

    parse()
    capsys.readouterr()


# README


def test_readme_links_and_commands():
    root = Path(poco.__file__).parent
    text = (root / "README.md").read_text()
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", text)
    assert len(links) >= 10
    for name, file, line in links:
        assert re.match(rf"(def|class) {name}\b", (root / file).read_text().splitlines()[int(line) - 1]), (name, file, line)
    commands = [command for command in re.findall(r"python ((?:poco|ogpo)\.py .*)", text) if "--help" not in command]
    assert len(commands) > 10
    for command in commands:
        words = shlex.split(
            comments=True, s=re.split(r"`|;| \|\|? | && |\)", command.replace("$seed", "1").replace("${bc_steps[seed]}", "420"))[0]
        )
        args = SCRIPTS[words[0][:4]].tyro.cli(SCRIPTS[words[0][:4]].Args, args=[word for word in words[1:] if word != "..."])
        if not (args.tensorboard or args.track or args.capture_video or args.render or args.cudagraphs):
            SCRIPTS[words[0][:4]].check_args(args)
