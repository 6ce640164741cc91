"""Tests of poco.py and ogpo.py: equations against float64 NumPy, samplers against known distributions, faults, and the command line.

What stands in both files is tested as poco.py's; a test holds that it is the same in ogpo.py.
"""

import ast
import copy
import csv
import functools
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

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
    (node,) = (node for node in ast.parse(Path(script.__file__).read_text()).body if getattr(node, "name", "") == "Args")
    pairs = zip(node.body, node.body[1:], strict=False)
    return {a.target.id: (ast.unparse(a.annotation), ast.unparse(b)) for a, b in pairs if isinstance(a, ast.AnnAssign)}


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
        assert fields[0][name] == fields[1][name]


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
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=2000)
    for _ in range(2000):
        obs = torch.randint(2, (512, 1)).float()  # the share of the upper mode is 0.3 for one observation, 0.8 for the other
        upper = torch.rand(512, 1) < 0.3 + 0.5 * obs
        chunk = torch.where(upper, 0.6, -0.4) + 0.05 * torch.randn(512, 2)
        poco.gradient_step(optimizer, policy.bc_loss(obs, chunk, None).mean(), "bc")
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
        expected.append((h @ w["net.9.weight"][m] + w["net.9.bias"][m])[:, 0])
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
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    for _ in range(1500):
        poco.update_critic(ConstantPolicy(2), critic, target, optimizer, buffer.sample(32), args)
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


def two_mode_bandit(**settings):
    """A clone with 80 % of its mass at -0.5 and 20 % at +0.5, where +0.5 is worth 1 and -0.5 nothing. Returns: share of +0.5 after POCO."""
    args = Args(num_candidates=8, posterior_batch_size=64, **settings)
    policy = FlowPolicy(obs_dim=1, chunk_dim=1, hidden_dim=64, flow_steps=10)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)

    def value(obs, chunk):  # stands for the critics, (M, B)
        return (chunk.T > 0).float()

    for step in range(1200):
        chunk = torch.where(torch.rand(128, 1) < 0.2, 0.5, -0.5) + 0.05 * torch.randn(128, 1)
        batch = poco.Batch(torch.zeros(128, 1), chunk, None, None, None, torch.ones(128, 1))
        if step < 600:
            poco.gradient_step(optimizer, policy.bc_loss(batch.obs, chunk, None).mean(), "bc")
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
    assert_marginals_are_those_of_the_ode(ogpo.sample_chain, flow, sigma)
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
    chain = ogpo.sample_chain(policy, obs, 0.0, noise)
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
        chain = ogpo.sample_chain(policy, torch.tensor(obs).float(), sigma)
        for points in (chain, chain + 0.01 * torch.randn_like(chain)):  # its own chain and another
            log_prob = ogpo.chain_log_prob(policy, torch.tensor(obs).float(), points, sigma)
            expected = numpy_chain_log_prob(policy, obs, points.double().numpy(), sigma)
            np.testing.assert_allclose(log_prob.detach(), expected, rtol=1e-4, atol=1e-4)


def test_log_prob_of_a_sampled_chain_is_the_density_of_its_own_noise():
    sigma, n, steps = 0.3, 7, 50
    torch.manual_seed(5)
    chain = ogpo.sample_chain(TWO_MODES, torch.zeros(n, 1), sigma, torch.zeros(n, 2).double())
    torch.manual_seed(5)
    xi = torch.stack([torch.randn(n, 2, dtype=torch.float64) for _ in range(steps)])  # the same draws
    std = sigma * torch.sqrt(1 - torch.arange(steps)[:, None, None] / steps) / steps**0.5
    expected = (-(xi**2) / 2 - std.log() - np.log(2 * np.pi) / 2).mean((0, 2))
    torch.testing.assert_close(ogpo.chain_log_prob(TWO_MODES, torch.zeros(n, 1), chain, sigma), expected, rtol=1e-6, atol=1e-6)


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
    chain = ogpo.sample_chain(policy, obs, 0.2)
    old_log_prob = ogpo.chain_log_prob(copy.deepcopy(policy), obs, chain, 0.2).detach()
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
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3)
    for _ in range(600):
        chunk = torch.where(torch.rand(128, 1) < 0.2, 0.5, -0.5) + 0.05 * torch.randn(128, 1)
        ogpo.gradient_step(optimizer, policy.bc_loss(torch.zeros(128, 1), chunk, None).mean(), "bc")
    return policy


def ogpo_bandit(steps=200, success_chunk=None, **settings):
    """Starts from the clone, where -0.5 is worth 0 and +0.5 is worth 1 to 2. Returns: share of +0.5 after OGPO, metrics, policies."""
    fixed = {"group_size": 8, "ppo_batch_size": 32, "sigma": 1.0, "clip_epsilon": 0.02, "policy_tau": 0.1, "num_critics": 2}
    args = ogpo.Args(**(fixed | {"success_coef": 0.0, "conservative": False} | settings))
    policy = copy.deepcopy(bandit_clone())
    old_policy, slow_policy = copy.deepcopy(policy), copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)

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
        optimizer = torch.optim.SGD(critic.parameters(), lr=0.0)
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
        batch = buffer.sample(200)
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
        batch = buffer.sample(300)
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
    with pytest.raises(FloatingPointError, match=r"environment step \d+.* observation"):
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


def test_nan_loss_stops_before_it_reaches_the_weights():
    policy = FlowPolicy(2, 2)
    before = [parameter.clone() for parameter in policy.parameters()]
    with pytest.raises(FloatingPointError, match="policy loss"):
        loss = policy.bc_loss(torch.full((1, 2), torch.nan), torch.ones(1, 2), None).mean()
        poco.gradient_step(torch.optim.Adam(policy.parameters()), loss, "policy")
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


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


@both_scripts
def test_ctrl_c_saves_prints_the_summary_and_exits_130(script, tmp_path):
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs inherit that it is ignored
    process = start(script, "--env-id", "FetchReach-v4", "--num-demos", 5, "--bc-steps", 20, cwd=tmp_path, preexec_fn=heed)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("runs/*/policy.pt")) and time.monotonic() < deadline:
        time.sleep(0.2)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert "evaluate_again" in out and "bc_success" in out
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
