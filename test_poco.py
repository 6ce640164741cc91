"""Tests of poco.py and ogpo.py: equations against float64 NumPy, samplers against known distributions,
faults, and the command line. What stands in both files, which a test compares, is tested as poco.py's.
"""

import ast
import contextlib
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
from unittest import mock

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from numpy.testing import assert_allclose

import ogpo
import poco
from poco import Args, Batch, CriticEnsemble, Encoder, FlowPolicy, Layout, ReplayBuffer, Trajectory

SCRIPTS = {"poco": poco, "ogpo": ogpo}
ROOT = Path(poco.__file__).parent
both_scripts = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def prepared(tmp_path, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)
    for script in SCRIPTS.values():
        monkeypatch.setattr(script, "atexit", types.SimpleNamespace(register=print))  # not when pytest ends


# The two files
OWN = {"METHOD", "Args", "MAY_BE_ZERO", "AT_LEAST_2", "AT_MOST_1", "update_critic", "update_policy"}
OWN |= {"train", "choose_chunk", "posterior_weights", "adaptive_temperature", "poco_loss", "chain_step"}
OWN |= {"sample_chain", "chain_log_prob", "group_advantage", "chi2_penalised_q", "ppo_loss"}
LIMITS = {poco: (1099, 443), ogpo: (1199, 543)}  # lines, last line of train


def test_what_both_scripts_share_is_identical_to_the_letter():
    """Without the first docstring and a method's own definitions."""
    shared = []
    for script in SCRIPTS.values():
        source = Path(script.__file__).read_text()
        lines, body = source.splitlines(), ast.parse(source).body
        for node in body:
            targets = getattr(node, "targets", [node])
            names = {getattr(target, "id", getattr(target, "name", "")) for target in targets}
            if names & OWN or node is body[0]:
                first = min(part.lineno for part in [node, *getattr(node, "decorator_list", ())])
                lines[first - 1 : node.end_lineno] = [None] * (node.end_lineno - first + 1)
        shared.append([line for line in lines if line])
    assert len(shared[0]) > 500 and shared[0] == shared[1]


def test_common_arguments_have_the_same_order_type_default_and_comment():
    fields = []
    for script in SCRIPTS.values():
        block = Path(script.__file__).read_text().split(" Args:")[1].split("\n\n")[0]
        fields.append(dict(re.findall(r"\n    (\w+)(: .+? = .+?  # .+)", block)))
        assert list(fields[-1]) == list(vars(script.Args()))
    common = [field for field in fields[0].items() if field[0] in fields[1]]
    assert len(common) > 25 and common == [field for field in fields[1].items() if field[0] in fields[0]]


def test_a_file_can_be_read_in_one_sitting():
    longest = {"test_poco.py": 1550, "README.md": 200, "speed.py": 300}
    for script, (lines, end_of_train) in LIMITS.items():
        longest[Path(script.__file__).name] = lines
        body = ast.parse(Path(script.__file__).read_text()).body
        (train,) = (node for node in body if getattr(node, "name", "") == "train")
        inner = [type(node) for part in train.body for node in ast.walk(part)]
        assert train.end_lineno <= end_of_train and not {ast.FunctionDef, ast.Lambda} & set(inner)
    for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmark/*.py"), ROOT / "README.md"]:
        lines, widest = path.read_text().splitlines(), 110 if path.name == "test_poco.py" else 100
        assert path.suffix == ".md" or max(map(len, lines)) <= widest, path
        assert len(lines) <= longest.get(path.name, 2000), path


def make_buffer(capacity, obs_dim, action_dim, chunk_size, td_steps=3, gamma=0.9, dtype=np.float32):
    env = types.SimpleNamespace(layout=Layout(Box(0, 255, (obs_dim,), dtype)), action_dim=action_dim)
    return ReplayBuffer(Args(chunk_size=chunk_size, td_steps=td_steps, gamma=gamma), env, capacity)


def new_policy(obs_dim, *settings, **named):
    return FlowPolicy(Encoder(Box(-np.inf, np.inf, (obs_dim,), np.float64)), *settings, **named)


def new_critic(obs_dim, *settings, **named):
    return CriticEnsemble(Encoder(Box(-np.inf, np.inf, (obs_dim,), np.float64)), *settings, **named)


# Flow policy
def numpy_velocity(policy, obs, x, t):
    """The network of FlowPolicy, written again in float64, with its normaliser."""
    w = {name: value.double().numpy() for name, value in policy.state_dict().items()}
    obs = np.clip((obs - w["encode.mean"]) / w["encode.std"], -10, 10)
    h = np.concatenate([obs, x, t], axis=1)
    for layer in (0, 3, 6):
        h = h @ w[f"net.{layer}.weight"].T + w[f"net.{layer}.bias"]
        h = h / (1 + np.exp(-h))  # SiLU
    return h @ w["net.9.weight"].T + w["net.9.bias"]


def numpy_bc_losses(policy, obs, chunk, valid, noise, t):
    """The flow-matching loss, written again; valid (B, T)."""
    error = (numpy_velocity(policy, obs, (1 - t) * noise + t * chunk, t) - (chunk - noise)) ** 2
    mask = np.repeat(valid, chunk.shape[1] // valid.shape[1], axis=1)
    return (error * mask).sum(1) / mask.sum(1)


def numpy_sample(policy, obs, x, steps):
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
    policy = new_policy(3, 6, flow_steps=7, dropout=0.1)
    policy.encode.mean.copy_(torch.randn(3))
    policy.encode.std.copy_(1 + torch.rand(3))
    return policy, np.random.default_rng(0).normal(size=(4, 3))


@pytest.mark.parametrize(("given", "steps"), [(None, 7), (3, 3)])
def test_sample_takes_euler_steps_and_clamps(flow, given, steps):
    policy, obs = flow
    torch.manual_seed(1)
    sampled = policy.sample(policy.encode(*tensors(obs)), given)
    torch.manual_seed(1)
    expected = numpy_sample(policy, obs, *doubles(torch.randn(4, 6)), steps)
    assert_allclose(sampled.detach(), expected, rtol=1e-4, atol=1e-6)
    assert policy.sample(torch.zeros(1000, 3)).abs().max() == 1


def test_dropout_is_for_cloning_alone(flow):
    policy, obs = flow
    x, t, batch = torch.zeros(4, 6), torch.zeros(4, 1), random_batch(4, 3, 2, 3)
    velocity = functools.partial(policy.velocity, policy.encode(*tensors(obs)), x, t)
    modes, honest = [], policy.bc_loss
    policy.bc_loss = lambda *given: modes.append(policy.training) or honest(*given)
    poco.update_clone(policy, torch.optim.SGD(policy.parameters(), lr=0.0), batch)
    assert modes == [True] and torch.equal(velocity(), velocity())
    policy.train()
    assert not torch.equal(velocity(), velocity())


def test_statistics_are_the_buffer_s_and_what_only_jitters_is_not_scaled():
    line = np.linspace(-5, 9, 100)
    obs = np.stack([0.1 + 0 * line, 0 * line, 0.3 + 1e-7 * line, line + 1e6, 0.01 * line], axis=1)
    buffer = make_buffer(200, 5, 2, 2, dtype=np.float64)
    buffer.add(Trajectory(obs, np.zeros((99, 2)), np.zeros(99), False, 0.0))
    for scale, offset in ((1, 0), (1e-4, 0), (1, 1e8)):  # small units, a large offset
        buffer.obs[:100] = scale * torch.tensor(obs)
        buffer.obs[:100, 3] += offset
        policy, critic = new_policy(5, 2), new_critic(5, 2, 2)
        poco.fit_statistics({"policy": policy, "critic": critic}, buffer)
        features = policy.encode(buffer.obs[:100])
        assert features.dtype == torch.float32 and torch.equal(features, critic.encode(buffer.obs[:100]))
        assert features[:, :3].abs().max() < 1e-5
        assert_allclose(features[:, 3:].std(0, correction=0), 1, rtol=1e-4)
        assert features[:, 4].mean().abs() < 1e-4 and policy.encode(buffer.obs + 100).abs().max() <= 10
    before = policy.encode.mean.clone()
    buffer.obs += 1
    poco.fit_statistics({"policy": policy}, buffer)  # those of a policy file stay
    assert torch.equal(policy.encode.mean, before)


def test_the_reward_scale_is_that_of_the_first_rewards_and_kept():
    critic, target_critic = new_critic(3, 2, 2), new_critic(3, 2, 2)
    buffer = make_buffer(200, 3, 2, 2)
    for rewards, scale in ((0.0, 0.0), (-4.0, 0.25), (1000.0, 0.25)):
        buffer.add(Trajectory(np.zeros((4, 3)), np.zeros((3, 2)), np.full(3, rewards), False, 0.0))
        poco.fit_reward_scale(critic, target_critic, buffer)
        assert critic.reward_scale == target_critic.reward_scale == scale


# Critic
def numpy_q(critic, obs, chunk):
    """The critics, written again in float64. Returns: (M, B)."""
    w = {name: value.double().numpy() for name, value in critic.state_dict().items()}
    values = []
    for m in range(len(critic.heads)):
        h = np.concatenate([(obs - w["encode.mean"]) / w["encode.std"], chunk], axis=1)
        for layer in (0, 3, 6):
            h = h @ w[f"hidden.{m}.{layer}.weight"].T + w[f"hidden.{m}.{layer}.bias"]
            h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
            h = h / (1 + np.exp(-h))
        values.append(h @ w[f"heads.{m}.weight"][0] + w[f"heads.{m}.bias"])
    return np.array(values)


def test_critics_are_independent_networks_with_layer_norm():
    critic, rng = new_critic(3, 2, num_critics=4, hidden_dim=16), np.random.default_rng(0)
    critic.encode.mean.copy_(torch.randn(3))
    obs, chunk = rng.normal(size=(5, 3)), rng.normal(size=(5, 2))
    q = critic(critic.encode(*tensors(obs)), *tensors(chunk))
    assert_allclose(q.detach(), numpy_q(critic, obs, chunk), rtol=1e-4, atol=1e-5)
    assert q.std(0).min() > 1e-3  # members start apart


def test_critic_loss_leaves_out_what_a_time_limit_cut_short():
    q, target = torch.tensor([[1.0, 50.0], [3.0, 50.0]], requires_grad=True), torch.tensor([2.0, 0.0])
    loss = poco.critic_loss(q, target, torch.tensor([1.0, 0.0]))
    loss.backward()
    assert loss.item() == 1 and q.grad.tolist() == [[-1, 0], [1, 0]]
    assert poco.critic_loss(q, target, torch.zeros(2)) == 0  # none: no NaN


@pytest.mark.parametrize("terminated, n, chunk_size, td_steps", [(1, 7, 5, 6), (1, 4, 2, 2), (0, 10, 2, 3)])
def test_critic_converges_to_the_values_of_a_small_mdp(terminated, n, chunk_size, td_steps):
    """A row of states whose last step is worth 1, with an end; or a ring of four, with a time limit."""
    gamma, length = 0.9, n if terminated else 4
    buffer = make_buffer(100, 8, 1, chunk_size, td_steps, gamma)
    rewards, state = 1.0 * (np.arange(n) % length == length - 1), np.arange(n + 1) % (length + terminated)
    buffer.add(Trajectory(np.eye(8)[state], np.ones((n, 1)), rewards, terminated, 1.0))
    args = Args(chunk_size=chunk_size, gamma=gamma, tau=0.05)
    policy = mock.Mock(encode=lambda obs: obs, sample=lambda obs: torch.ones(len(obs), chunk_size))
    critic, target = (new_critic(8, chunk_size, 2, hidden_dim=32) for _ in range(2))
    critic.reward_scale.fill_(1)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3, fused=True)
    for _ in range(1000):
        poco.update_critic(policy, critic, target, optimizer, buffer.sample(32), args)
    values = [gamma ** (length - 1 - i) / (1 if terminated else 1 - gamma**4) for i in range(length)]
    q = critic(torch.eye(8)[:length], torch.ones(length, chunk_size))
    assert_allclose(q.detach(), [values, values], rtol=0.05)


# POCO
@pytest.mark.parametrize("eta", [0.1, 1.0, 30.0])
def test_posterior_weights_are_a_softmax_and_finite_at_extremes(eta):
    q = np.random.default_rng(0).normal(size=(6, 5))
    expected = np.exp(q / eta) / np.exp(q / eta).sum(1, keepdims=True)
    assert_allclose(poco.posterior_weights(torch.tensor(q), eta), expected, rtol=1e-10)
    q = torch.tensor([[1e6, -1e6, 3e6], [-1e6, -1e6, -1e6]])
    assert_allclose(poco.posterior_weights(q, eta), [[0, 0, 1], [1 / 3] * 3], rtol=1e-6)
    assert poco.adaptive_temperature(q[1:], 0.3) > 0  # of equal values


@pytest.mark.parametrize(("scale", "share"), [(1.0, 0.3), (-50.0, 0.1), (1e-3, 0.7)])
def test_adaptive_temperature_gives_the_effective_samples_at_any_scale_of_q(scale, share):
    values = scale * np.random.default_rng(0).normal(size=(4, 20_000)) * [[1], [3], [0.1], [7]]
    eta = poco.adaptive_temperature(torch.tensor(values), share)
    assert_allclose(eta[:, 0], values.std(1) / np.sqrt(np.log(1 / share)), rtol=1e-4)
    samples = 1 / poco.posterior_weights(torch.tensor(values), eta).square().sum(1)
    assert_allclose(samples / 20_000, share, rtol=0.25)


@pytest.mark.parametrize(("beta", "zeta"), [(1.0, 0.4), (0.3, 1.0), (0.0, 0.5)])
def test_poco_loss_is_equation_23_and_beyond_the_clip_there_is_no_gradient(beta, zeta):
    rng = np.random.default_rng(0)
    losses, bc, weights = rng.exponential(size=(7, 4)), rng.exponential(size=9), rng.dirichlet(np.ones(4), 7)
    given = torch.tensor(losses, requires_grad=True)
    loss = poco.poco_loss(given, torch.tensor(weights), torch.tensor(bc), beta, zeta)
    loss.backward()
    posterior = (weights * np.minimum(losses, zeta)).sum(1).mean()
    assert loss.item() == pytest.approx(beta * posterior + bc.mean(), rel=1e-12)
    assert_allclose(given.grad, beta * weights / 7 * (losses < zeta), rtol=1e-10)


def random_batch(n, obs_dim, action_dim, chunk_size):
    valid = (torch.arange(chunk_size) < torch.randint(1, chunk_size + 1, (n, 1))).float()
    obs, next_obs = torch.randn(2, n, obs_dim)
    chunk = torch.rand(n, chunk_size * action_dim) * 2 - 1
    kept = (torch.arange(n) % 3 > 0).float()
    return Batch(obs, chunk, torch.randn(n), next_obs, torch.rand(n), torch.zeros(n), kept, valid)


FIXED = {"temperature": 0.2, "clip_threshold": 0.9, "posterior_coef": 0.5, "anchor": "all"}


@pytest.mark.parametrize("settings", [{}, FIXED])
def test_poco_s_update_as_a_whole(settings):
    """Also of bc_loss and sample: the random numbers drawn again in their order, all else in NumPy."""
    args = Args(bf16=False, num_candidates=4, posterior_batch_size=3, flow_steps=3, **settings)
    policy, critic, batch = new_policy(3, 4, flow_steps=3), new_critic(3, 4, 2), random_batch(8, 3, 2, 2)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    torch.manual_seed(5)
    metrics = poco.update_policy(policy, critic, optimizer, batch, args)
    torch.manual_seed(5)
    drawn = [torch.randn(12, 4), torch.randn(12, 4), torch.rand(12, 1), torch.randn(8, 4), torch.rand(8, 1)]
    noise, x_0, t, *batch_drawn = doubles(*drawn)
    obs = np.repeat(batch.obs[:3].double().numpy(), 4, axis=0)
    candidates = numpy_sample(policy, obs, noise, 6)  # twice K
    q = numpy_q(critic, obs, candidates).mean(0).reshape(3, 4)
    eta = args.temperature or q.std(1, ddof=1, keepdims=True) / np.sqrt(-np.log(args.effective_samples))
    weights = np.exp((q - q.max(1, keepdims=True)) / eta)
    weights /= weights.sum(1, keepdims=True)
    losses = numpy_bc_losses(policy, obs, candidates, np.ones((12, 1)), x_0, t).reshape(3, 4)
    bc = numpy_bc_losses(policy, *doubles(batch.obs, batch.chunk, batch.valid), *batch_drawn)
    zeta = args.clip_threshold or np.quantile(bc, 0.9)
    bc = bc if settings else bc[batch.kept > 0]
    expected = args.posterior_coef * (weights * np.minimum(losses, zeta)).sum(1).mean() + bc.mean()
    assert metrics["losses/actor_loss"].item() == pytest.approx(expected, rel=1e-4)
    assert metrics["losses/bc_loss"].item() == pytest.approx(bc.mean(), rel=1e-4)
    assert metrics["losses/clip_fraction"].item() == pytest.approx((losses > zeta).mean())
    samples = (1 / (weights**2).sum(1)).mean()
    assert metrics["losses/effective_samples"].item() == pytest.approx(samples, rel=1e-3)


def test_a_batch_in_which_everything_failed_is_cloned_as_a_whole():
    policy, critic, batch = new_policy(3, 4), new_critic(3, 4, 2), random_batch(16, 3, 2, 2)
    optimizer, losses = torch.optim.SGD(policy.parameters(), lr=0.0), []
    for kept in (0.0, 1.0):
        torch.manual_seed(0)
        args = Args(num_candidates=2, posterior_batch_size=4, chunk_size=2)
        failed = batch._replace(kept=torch.full((16,), kept))
        losses.append(poco.update_policy(policy, critic, optimizer, failed, args)["losses/actor_loss"])
    assert losses[0] == losses[1]


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
both_flows = pytest.mark.parametrize("flow", [GAUSSIAN, TWO_MODES], ids=["gaussian", "two modes"])


def assert_marginals(flow, sigma, n=4000):
    """Mean, covariance and mode shares lie within 4.5 standard errors of the ODE's: those with sigma 0."""
    x = torch.stack([ogpo.sample_chain(flow, torch.zeros(n, 1), s)[0][-1] for s in (sigma, 0.0)])
    moments = torch.cat([x, x**2, x.prod(2, keepdim=True), (x[..., :1] > 0.1).double()], dim=2)  # (2, n, 6)
    difference, variance = moments.mean(1).diff(dim=0).abs(), moments.var(1).sum(0)
    assert (difference < 4.5 * torch.sqrt(variance / n)).all()
    for mode in (x[0, :, 0] > 0.1, x[0, :, 0] <= 0.1) if flow is TWO_MODES else ():
        assert x[0, mode].std(0).max() < 0.1 * 1.08 and x[0, mode].std(0).min() > 0.1 * 0.88


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
@both_flows
def test_the_stochastic_sampler_keeps_the_marginals_of_the_ode(flow, sigma):
    assert_marginals(flow, sigma)


@pytest.mark.parametrize(("sigma", "without"), [(0.5, "score"), (1, "score"), (0.1, "root"), (1, "root")])
@both_flows
def test_a_sampler_without_one_of_its_parts_does_not(flow, without, sigma, monkeypatch):
    honest, dt = ogpo.chain_step, 1 / flow.flow_steps

    def step(flow, features, x, t, sigma):
        right, v = honest(flow, features, x, t, sigma), flow.velocity(features, x, t)
        wrong = (x + v * dt, right.stddev) if without == "score" else (right.mean, right.stddev / dt**0.5)
        return torch.distributions.Normal(*wrong, validate_args=False)

    monkeypatch.setattr(ogpo, "chain_step", step)
    with pytest.raises(AssertionError):
        assert_marginals(flow, sigma)


def numpy_log_prob(policy, obs, chain, sigma):
    """log N(x_{k+1}; mean, std^2) of every step and dimension, averaged. Args: chain (K + 1, B, D)."""
    steps, total = len(chain) - 1, 0
    for k in range(steps):
        x, after, t = chain[k], chain[k + 1], k / steps
        v = numpy_velocity(policy, obs, x, np.full((len(x), 1), t))
        sigma_t, score = sigma * np.sqrt(1 - t), (t * v - x) / (1 - t)
        mean, std = x + (v + sigma_t**2 / 2 * score) / steps, sigma_t / np.sqrt(steps)
        total += -(((after - mean) / std) ** 2) / 2 - np.log(std) - np.log(2 * np.pi) / 2
    return total.mean(1) / steps


@pytest.mark.parametrize("sigma", [0.1, 1.0])
def test_chain_log_prob_is_that_of_the_chain_s_normal_steps(flow, sigma):
    policy, obs = flow
    features = policy.encode(*tensors(obs))
    chain, own = ogpo.sample_chain(policy, features, sigma)
    other = chain + 0.01 * torch.randn_like(chain)
    recomputed, others = (ogpo.chain_log_prob(policy, features, x, sigma).detach() for x in (chain, other))
    for points, log_prob in ((chain, own), (chain, recomputed), (other, others)):
        expected = numpy_log_prob(policy, obs, points.double().numpy(), sigma)
        assert_allclose(log_prob, expected, rtol=1e-4, atol=1e-4)


def numpy_advantage(q, conservative):
    """The critics' mean; or the advantage nearest to zero where all agree on its sign, else 0."""
    advantage = q - q.mean(2, keepdims=True)
    nearest = np.take_along_axis(advantage, np.abs(advantage).argmin(0)[None], axis=0)[0]
    agree = (advantage > 0).all(0) | (advantage < 0).all(0)
    return np.where(agree, nearest, 0) if conservative else advantage.mean(0)


@pytest.mark.parametrize("conservative", [False, True])
def test_the_advantage_is_over_the_group_s_mean_and_can_be_zero_where_critics_disagree(conservative):
    q = np.random.default_rng(0).normal(size=(3, 6, 4))
    advantage = ogpo.group_advantage(torch.tensor(q), conservative)
    assert_allclose(advantage, numpy_advantage(q, conservative), rtol=1e-10)
    assert 0.3 < (advantage == 0).double().mean() < 0.95 or not conservative


def numpy_chi2(q, ratio, coef, sharpness):
    w = 1 / (1 + np.exp(-sharpness * (ratio - 1)))
    return (1 - w) * q.mean(0) + w * q.min(0) - coef * q.std(0) * ratio


def test_the_chi_squared_penalty():
    rng = np.random.default_rng(0)
    q, ratio = rng.normal(size=(3, 6, 4)), rng.exponential(size=(6, 4))
    penalised = ogpo.chi2_penalised_q(torch.tensor(q), torch.tensor(ratio), 0.1, 5.0)
    assert_allclose(penalised, numpy_chi2(q, ratio, 0.1, 5.0), rtol=1e-10)


def test_ppo_loss_is_the_clipped_surrogate_and_its_gradient_ends_at_the_clip():
    draws = torch.tensor(np.random.default_rng(0).normal(size=(3, 200)) * [[0.05], [0.05], [1.0]])
    log_prob, old_log_prob, advantage = draws[0].requires_grad_(), draws[1], draws[2]
    loss, metrics = ogpo.ppo_loss(log_prob, old_log_prob, advantage, 0.03)
    loss.backward()
    ratio, advantage = np.exp((log_prob - old_log_prob).detach().numpy()), advantage.numpy()
    expected = -np.minimum(ratio * advantage, np.clip(ratio, 0.97, 1.03) * advantage).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert metrics["losses/clip_fraction"].item() == pytest.approx((np.abs(ratio - 1) > 0.03).mean())
    far = np.where(advantage > 0, ratio > 1.03, ratio < 0.97)  # the way the advantage points
    assert_allclose(log_prob.grad, np.where(far, 0, -ratio * advantage / 200), rtol=1e-10)


@pytest.mark.parametrize("settings", [{}, {"conservative": False, "chi2_coef": 0.3, "success_coef": 0.5}])
def test_ogpo_s_update_as_a_whole(settings):
    """The random numbers drawn again in their order, everything else in NumPy."""
    args = ogpo.Args(bf16=False, group_size=4, ppo_batch_size=3, sigma=0.8, **settings)
    policy, critic = new_policy(3, 4, flow_steps=3), new_critic(3, 4, args.num_critics)
    actors = (policy, copy.deepcopy(policy), copy.deepcopy(policy))
    for parameter in [*actors[1].parameters(), *actors[2].parameters()]:
        parameter.data += 0.02 * torch.randn_like(parameter)
    batch, successes, before = random_batch(8, 3, 2, 2), random_batch(5, 3, 2, 2), copy.deepcopy(actors)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.1)
    torch.manual_seed(5)
    metrics = ogpo.update_policy(*actors, critic, optimizer, batch, successes, args)
    torch.manual_seed(5)
    obs = np.repeat(batch.obs[:3].double().numpy(), 4, axis=0)
    chain = [torch.randn(12, 4).double().numpy()]
    for t in np.arange(3) / 3:
        x, v = chain[-1], numpy_velocity(before[1], obs, chain[-1], np.full((12, 1), t))
        noise = 0.8 * np.sqrt((1 - t) / 3) * torch.randn(12, 4).double().numpy()
        chain.append(x + (v + 0.8**2 / 2 * (t * v - x)) / 3 + noise)
    new, old, slow = (numpy_log_prob(actor, obs, np.array(chain), 0.8) for actor in before)
    q = numpy_q(critic, obs, np.clip(chain[-1], -1, 1)).reshape(-1, 3, 4)
    if args.chi2_coef:
        ratio = np.exp(new - slow).reshape(3, 4)
        q = q + numpy_chi2(q, ratio, args.chi2_coef, args.chi2_sharpness) - q.mean(0)
    advantage = (numpy_advantage(q, args.conservative) / q.mean(0).std(1).mean()).flatten()
    ratio = np.exp(new - old)
    clipped = np.clip(ratio, 1 - args.clip_epsilon, 1 + args.clip_epsilon)
    own = successes.obs, successes.chunk, successes.valid, torch.randn(5, 4), torch.rand(5, 1)
    bc_loss = numpy_bc_losses(before[0], *doubles(*own)).mean()
    expected = -np.minimum(ratio * advantage, clipped * advantage).mean() + args.success_coef * bc_loss
    assert metrics["losses/actor_loss"].item() == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert metrics["losses/bc_loss"].item() == pytest.approx(bc_loss, rel=1e-4)
    for i, rate in ((1, args.policy_tau), (2, args.chi2_tau if args.chi2_coef else 0.0)):
        for new, old, moved in zip(*(p.parameters() for p in (policy, before[i], actors[i])), strict=True):
            torch.testing.assert_close(moved, old + rate * (new - old))


@pytest.mark.parametrize("n", [1, 8])
def test_next_chunk_samples_average_the_td_target(n):
    """The critic says 0, its target the chunk drawn, N(0, 1): the loss is the variance of the mean of n."""
    class Times(torch.nn.Linear):
        encode, reward_scale = torch.nn.Identity(), 1.0

        def forward(self, features, chunk):
            return self.weight * chunk.T

    critic, target = Times(1, 1), Times(1, 1)
    critic.weight.data, target.weight.data = torch.zeros(1, 1), torch.ones(1, 1)
    policy = mock.Mock(encode=lambda obs: obs, sample=lambda obs: torch.randn(len(obs), 1))
    zeros, column, optimizer = torch.zeros(4000), torch.zeros(4000, 1), torch.optim.SGD(critic.parameters())
    batch = Batch(column, column, zeros, column, zeros + 1, zeros, zeros, 1 + column)
    args = ogpo.Args(next_samples=n, chunk_size=1)
    metrics = ogpo.update_critic(policy, critic, target, optimizer, batch, args)
    assert metrics["losses/qf_loss"].item() == pytest.approx(1 / n, rel=0.1)


# Replay buffer
@pytest.mark.parametrize("terminated", [True, False])
def test_td_target_and_windows_on_a_hand_made_episode(terminated):
    """Window 0 ends inside the episode, window 1 at its end, windows 2 and 3 are padded."""
    buffer = make_buffer(10, 1, 1, chunk_size=3)
    steps = np.arange(5.0)[:, None], np.arange(1.0, 5)[:, None] / 10, np.array([1.0, 2.0, 4.0, 8.0])
    buffer.add(Trajectory(*steps, terminated, {True: 0.0, False: np.nan}[terminated]))
    drawn = buffer.sample(200)
    starts = drawn.obs[:, 0].tolist()
    assert set(starts) == {0, 1, 2, 3}
    batch = Batch(*(column[[starts.index(i) for i in range(4)]] for column in drawn))
    target = poco.td_target(batch.reward, 100 + batch.next_obs[:, 0], batch.terminated, batch.discount)
    inside, beyond = 1 + 0.9 * 2 + 0.81 * 4 + 0.729 * 103, 0 if terminated else 0.729 * 104
    assert target[:2].tolist() == pytest.approx([inside, 2 + 0.9 * 4 + 0.81 * 8 + beyond], rel=1e-6)
    assert batch.terminated.tolist() == [0, terminated, terminated, terminated]
    assert set(batch.kept.tolist()) == {0.0 if terminated else 1.0}  # failed, or not reported
    assert batch.valid.tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    assert batch.chunk[2, :2].tolist() == pytest.approx([0.3, 0.4])
    assert len(drawn.chunk[drawn.obs[:, 0] == 2][:, 2].unique()) > 2  # never executed: from other windows
    assert batch.reward[2].item() == pytest.approx(4 + 0.9 * 8, rel=1e-6) and batch.next_obs[2].item() == 4


def numbered_episode(episode, n):
    """A step carries its episode and place."""
    obs = np.stack([np.full(n + 1, episode), np.arange(n + 1)], axis=1).astype(float)
    return Trajectory(obs, (obs[:-1] @ [100, 1])[:, None], np.ones(n), episode % 2 == 0, 0.0)


@pytest.mark.parametrize("td_steps", [4, 9])
@pytest.mark.parametrize("capacity", [1000, 37, 5])
def test_buffer_never_mixes_episodes(capacity, td_steps):
    """Windows are runs of one episode, of the newest rows; chunks are their first 4 steps."""
    lengths = np.random.default_rng(0).integers(1, 12, 25).tolist()
    buffer, written = make_buffer(capacity, 2, 1, 4, td_steps), []
    for episode, n in enumerate(lengths):
        buffer.add(numbered_episode(episode, n))
        written += [(episode, step) for step in range(n + 1)]
        rows = set(written[-capacity:])
        for obs, chunk, reward, next_obs, discount, terminated, _, valid in zip(*buffer.sample(100)):
            e, step = obs.int().tolist()
            n = min(td_steps, lengths[e] - step)
            k = min(4, n)
            assert (e, step) in rows and valid.tolist() == [1] * k + [0] * (4 - k)
            assert chunk.tolist()[:k] == [e * 100 + step + i for i in range(k)]
            assert next_obs.tolist() == [e, step + n]
            assert [reward, discount] == pytest.approx([(1 - 0.9**n) / (1 - 0.9), 0.9**n], rel=1e-5)
            assert terminated == (e % 2 == 0 and step + n == lengths[e])
        assert len(buffer) == sum(step < lengths[e] for e, step in rows)


def test_an_observation_is_kept_once_in_its_own_type():
    buffer = make_buffer(100, 5, 1, chunk_size=3, dtype=np.uint8)
    pictures = np.random.default_rng(0).integers(0, 256, (9, 5), dtype=np.uint8)
    buffer.add(Trajectory(pictures, np.zeros((8, 1)), np.zeros(8), False, 0.0))
    assert buffer.obs.dtype == buffer.sample(4).next_obs.dtype == torch.uint8
    assert buffer.size == 9 and len(buffer) == 8 and np.array_equal(buffer.obs[:9], pictures)


# Environments
FAR = np.finfo(np.float32).max
BOXES = {"no bounds": Box(-np.inf, np.inf, (1,)), "huge": Box(-FAR, FAR, (1,))}
BOXES["one value"] = Box(np.float32([0, 1]), np.float32([1, 1]))
BOXES["rounding"] = Box(np.float32([[0.1], [5.0]]), np.float32([[123.4], [7.3]]))


class Counting(gym.Env):
    """Counts its steps. Episodes of even length terminate, odd ones hit a limit; length 5 is a success."""
    observation_space = gym.spaces.Dict({"count": Box(-np.inf, np.inf, (1,)), "goal": Box(-1, 1, (2,))})
    action_space = Box(np.array([[0.0], [-4.0]]), np.array([[10.0], [4.0]]), (2, 1), np.float64)

    def __init__(self, render_mode=None, fault="", factor=1.0):
        self.fault, self.factor, self.steps = fault, factor, 0
        self.action_space = BOXES.get(fault, self.action_space)
        if fault == "sequence":
            self.observation_space = gym.spaces.Sequence(Box(0, 1, (1,)))

    def obs(self):
        poisoned = (self.fault == "rare nan" and self.end == 7) or self.fault == "nan"
        return {"count": np.float32([np.nan if poisoned else self.t]), "goal": np.zeros(2, np.float32)}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        if self.fault == "raises in reset":
            raise ConnectionError("the robot does not answer")
        self.t, self.end = 0, int(self.np_random.integers(3, 9))
        return self.obs() if self.fault == "old reset" else (self.obs(), {})

    def step(self, action):
        assert self.action_space.contains(action)
        self.t, self.steps = self.t + 1, self.steps + 1
        if self.fault == "raises" and self.t == 2 and self.end == 8:
            raise ConnectionError("the robot does not answer")
        over, even, solved = self.t >= self.end and self.fault != "endless", self.end % 2 == 0, self.end == 5
        infos = {"passing": {"success": self.t == 2}, "silent": {}, "info none": None}
        infos["only success"] = {"success": True} if over and self.end == 5 else {}  # some say it only then
        infos |= {"success array": {"success": np.array([solved])}, "success text": {"success": str(solved)}}
        named = {"success": {"lift": solved}}
        infos |= {"success several": {"success": [solved] * 2}, "success named": named}
        info = infos.get(self.fault, {"is_success": float(solved)})
        reward = self.factor * float(action[0, 0])
        reward = {"reward array": np.array([reward]), "reward none": None}.get(self.fault, reward)
        obs = {"goal": np.zeros(2)} if self.fault == "part of an observation" else self.obs()
        return obs, reward, over and even, over and not even, info


class Point(gym.Env):
    """Moves a point to a goal; solved while nearer than 0.1."""
    observation_space, action_space = Box(-np.inf, np.inf, (2,), np.float64), Box(-1, 1, (1,))
    render_mode = None

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.goal = 0.0, float(self.np_random.uniform(-1, 1))
        return np.array([self.x, self.goal]), {}

    def step(self, action):
        self.x += 0.2 * float(action[0])
        solved = abs(self.x - self.goal) < 0.1
        return np.array([self.x, self.goal]), solved - 1.0, False, False, {"success": solved}


gym.register("Counting-v0", lambda: Counting())  # without arguments
gym.register("Point-v0", lambda: Point(), max_episode_steps=20)
for factor in (0.01, 100, 1024):
    gym.register(f"Times{factor}-v0", Counting, kwargs={"factor": factor})
ODD = ["info none", "success text", "success several", "success named", "reward none", "old reset"]
ODD += ["part of an observation"]
FAULTS = ["nan", "rare nan", "raises", "raises in reset", "endless", "sequence", *BOXES, "only success", *ODD]
for fault in [*FAULTS, "passing", "silent", "success array", "reward array"]:
    gym.register(f"{fault.title().replace(' ', '')}-v0", Counting, kwargs={"fault": fault})
FAMILIES = ["FetchReach-v4", "AdroitHandDoor-v1", "FrankaKitchen-v1", "HandReach-v3", "PointMaze_UMaze-v3"]
FAMILIES += ["AntMaze_UMaze-v5", "HandManipulateBlock-v1", "Pendulum-v1"]


def episodes_of(env_id, action=0.0, n=20, **settings):
    """The episodes of the seeds 0 to n - 1, in which every action is the same."""
    env, episodes = poco.Environment(Args(env_id=env_id, **settings), first_seed=0), []
    while len(episodes) < n:
        env.set_chunk(torch.full((env.action_dim,), float(action)))
        episodes += env.step()
    env.close()
    return episodes


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_no_step_is_a_reset_and_an_episode_is_its_seed_s_and_starts_with_a_chunk(chunk_size):
    env, episodes = poco.Environment(Args(env_id="Counting-v0"), first_seed=0), []
    chunk = torch.arange(chunk_size).repeat_interleave(2) / 10  # an action tells its place
    for _ in range(200):
        if not env.chunk:
            assert env.obs[-1][0] % chunk_size == 0
            env.set_chunk(chunk)
        episodes += env.step()
    for seed, episode in enumerate(episodes):
        n, own = len(episode.actions), Counting()
        own.reset(seed=seed)
        assert own.end == n
        assert episode.obs[:, 0].tolist() == list(range(n + 1))  # the last is the end's, not the next one's
        assert_allclose(episode.actions[:, 0], np.arange(n) % chunk_size / 10, rtol=1e-6)
        assert_allclose(episode.rewards, 5 + 5 * episode.actions[:, 0], rtol=1e-6)
        assert episode.terminated == (n % 2 == 0) and episode.success == (n == 5)
    unfinished = env.close()
    assert not any(episode.terminated for episode in unfinished)
    assert sum(len(episode.actions) for episode in episodes + unfinished) == 200


@mock.patch.object(poco, "choose_chunk", wraps=poco.choose_chunk)
def test_evaluation_is_the_mean_over_its_seeds(chosen, capsys):
    args = Args(env_id="Counting-v0", chunk_size=2, hidden_dim=16, eval_episodes=20, eval_best_of_n=3)
    policy, critic, episodes = new_policy(3, 4), new_critic(3, 4, 2), episodes_of("Counting-v0")
    success = poco.mean_success(episodes)
    assert 0 < poco.evaluate(policy, critic, args, Path(), "step 5")["eval/success"] == success
    assert f"step 5: success {success:.2f}, mean" in capsys.readouterr().out and chosen.call_args.args[3] == 3


@pytest.mark.parametrize(("script", "value"), [(poco, np.mean), (ogpo, np.min)], ids=SCRIPTS)
def test_the_best_of_n_is_that_of_the_critics_mean_or_minimum(script, value):
    policy, critic = new_policy(3, 4), mock.Mock(encode=lambda obs: obs, side_effect=lambda obs, x: x.T[:2])
    torch.manual_seed(3)
    candidates = policy.sample(torch.zeros(8, 3)).numpy(force=True)
    torch.manual_seed(3)
    chosen = script.choose_chunk(policy, critic, np.zeros(3), 8)
    assert_allclose(chosen, candidates[value(candidates[:, :2], axis=1).argmax()], rtol=1e-5)


def test_an_episode_with_nan_is_left_out_and_named(capsys):
    lengths = [len(episode.actions) for episode in episodes_of("Counting-v0", n=30)]
    usable = [n for n in lengths if n != 7]
    assert [len(episode.actions) for episode in episodes_of("RareNan-v0", n=len(usable))] == usable
    assert f"infinity in the episode of seed {lengths.index(7)}, left out" in capsys.readouterr().out
    assert np.isfinite(episodes_of("RareNan-v0")[0].rewards).all()
    folder = small_run(poco, env_id="RareNan-v0")
    evaluations = [float(row["eval/success"]) for row in rows_of(folder) if row["eval/success"]]
    assert np.isfinite(evaluations).all() and torch.isfinite(states_of(folder)["buffer"]["obs"]).all()


@pytest.mark.parametrize("env_id", ["SuccessArray-v0", "RewardArray-v0"])
def test_arrays_of_one_number_are_numbers(env_id):
    for episode, plain in zip(episodes_of(env_id, 0.5), episodes_of("Counting-v0", 0.5), strict=True):
        assert_same_episodes([episode], [plain])


@pytest.mark.parametrize(("env_id", "low", "high"), [("Counting-v0", 0, 10), ("Rounding-v0", 0.1, 123.4)])
def test_actions_cover_the_environment_s_box_and_rounding_does_not_leave_it(env_id, low, high):
    rewards = [episodes_of(env_id, action, 1)[0].rewards[0] for action in (-1, 0, 1)]
    assert rewards == pytest.approx([low, (low + high) / 2, high], abs=1e-4)


@pytest.mark.parametrize("case", ["Passing-v0 end", "Passing-v0 any", "OnlySuccess-v0 end", "Silent-v0 end"])
def test_success_is_the_last_step_s_or_any_s_and_where_only_success_is_reported_others_failed(case):
    env_id, success_at = case.split()
    episodes = episodes_of(env_id, success_at=success_at)
    of_length_5 = np.mean([len(episode.actions) == 5 for episode in episodes])
    expected = {"Silent-v0": np.nan, "OnlySuccess-v0": of_length_5, "Passing-v0": success_at == "any"}[env_id]
    assert_allclose(poco.mean_success(episodes), float(expected))


def test_an_environment_without_a_limit_is_cut_off(monkeypatch):
    honest = gym.wrappers.TimeLimit
    monkeypatch.setattr(poco.gym.wrappers, "TimeLimit", lambda env, limit: honest(env, limit // 1000))
    (episode,) = episodes_of("Endless-v0", n=1)
    assert len(episode.actions) == 10 and not episode.terminated


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", FAMILIES)
def test_environment_families_report_success_or_not(env_id):
    env = poco.Environment(Args(env_id=env_id), first_seed=0)
    env.set_chunk(torch.zeros(env.action_dim))
    assert env.obs[0].ndim == 1 and env.step() == []
    (episode,) = env.close()
    silent = env_id in ("Pendulum-v1", "FrankaKitchen-v1")
    assert np.isnan(episode.success) == silent and episode.success != 1


class Exclusive(Point):
    """Holds a device, and draws from NumPy's global generator."""
    held = 0

    def __init__(self):
        assert Exclusive.held == 0
        Exclusive.held += 1

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        obs[1] = self.goal = np.random.uniform(-1, 1)
        return obs, info

    def close(self):
        Exclusive.held -= 1


gym.register("Exclusive-v0", lambda: Exclusive(), max_episode_steps=20)


# Whole runs
RUN = {"env_id": "Counting-v0", "dataset": "none", "chunk_size": 2, "hidden_dim": 16, "batch_size": 32}
RUN |= {"eval_episodes": 5, "critic_warmup": 60, "total_timesteps": 300, "utd_ratio": 0.5}
RUN |= {"best_of_n": 1, "policy_start": 120, "eval_interval": 150, "log_interval": 60}


def as_typed(**options):
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in options.items()]
    return [str(part) for pair in pairs for part in pair if part is not True]


def main(script, *typed, **options):
    """What the command line does, in this process. Returns: the exit status."""
    with mock.patch.object(sys, "argv", [script.__file__, *map(str, typed), *as_typed(**options)]):
        try:
            return script.main() or 0
        except SystemExit as exit_:
            return exit_.code


def small_run(script, folder=".", status=0, **settings):
    """Returns: the folder of a run in an empty folder."""
    Path(folder).mkdir(exist_ok=True)
    with contextlib.chdir(folder):
        assert main(script, **(RUN | settings)) == status
    (run,) = Path(folder, "runs").resolve().iterdir()
    return run


def rows_of(folder):
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def states_of(folder):
    content = torch.load(folder / "policy.pt", weights_only=True)
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["learner"]
    return state | {"policy.pt": content["policy"], "critic.pt": content["critic"]}


def write_demos(n=24, gains=(5.0,)):
    """Demonstrations of Point-v0, a row a step. Returns: the options to use them."""
    rng, x, actions = np.random.default_rng(0), np.zeros((n, 21)), np.zeros((n, 20))
    goal = rng.uniform(-1, 1, (n, 1))
    for t in range(20):
        gain = np.resize(gains, n) * (goal[:, 0] - x[:, t])
        actions[:, t] = np.clip(gain + 0.3 * rng.normal(size=n), -1, 1)
        x[:, t + 1] = x[:, t] + 0.2 * actions[:, t]
    obs, success = np.stack([x, goal + 0 * x], axis=2), 1.0 * (np.abs(x[:, 1:] - goal) < 0.1).ravel()
    columns = {"observations": obs[:, :-1].reshape(-1, 2), "next_observations": obs[:, 1:].reshape(-1, 2)}
    columns |= {"actions": actions.reshape(-1, 1), "rewards": success - 1, "success": success}
    np.savez("demos.npz", **columns, terminals=0 * success, timeouts=np.arange(20 * n) % 20 == 19)
    return {"env_id": "Point-v0", "dataset": str(Path("demos.npz").resolve())}


@both_scripts
def test_a_run_writes_its_files_and_rows(script, capsys):
    folder = small_run(script)
    rows = rows_of(folder)
    assert [int(row["global_step"]) for row in rows] == [0, 60, 120, 150, 180, 240, 300]
    assert [row["eval/success"] != "" for row in rows] == [step in (0, 3, 6) for step in range(7)]
    assert rows[2]["losses/qf_loss"] and not rows[2]["losses/actor_loss"] and rows[4]["losses/actor_loss"]
    assert states_of(folder)["policy"]["encode.mean"][0] > 0.5  # statistics of what it met
    assert re.fullmatch(rf"Counting-v0__{script.METHOD}__1__[\d-]+", folder.name)
    assert sorted(path.stem for path in folder.iterdir()) == ["checkpoint", "clone", "metrics", "policy"]
    out, err = capsys.readouterr()
    for option in (f"--resume runs/{folder.name}", f"--evaluate runs/{folder.name}/policy.pt"):
        assert f"python {script.METHOD}.py {option}\n" in out
    assert re.search(r"300/300 \[.*, success=\d\.\d\d\]", err)  # the progress bar


@both_scripts
def test_a_policy_file_evaluates_as_in_its_run_and_what_is_typed_counts(script, capsys):
    policy = small_run(script) / "policy.pt"
    results = re.findall(r"step 300: (success .*)", capsys.readouterr().out)
    assert main(script, "--evaluate", policy) == main(script, "--evaluate", policy, "--eval-episodes", 3) == 0
    out = capsys.readouterr().out
    assert f": {results[-1]}\n" in out and "3 episodes" in out


def test_a_run_is_the_same_at_any_scale_of_rewards_and_log_interval():
    first = small_run(poco, "one")
    for factor in (1024, 100, 0.01):
        folders = first, small_run(poco, f"x{factor}", env_id=f"Times{factor}-v0", log_interval=37)
        for a, b in zip(*(states_of(folder)["policy.pt"].values() for folder in folders), strict=True):
            assert (a - b).abs().max() <= (0 if factor == 1024 else 1e-3)  # rounding but at powers of 2
        one, scaled = (float(rows_of(folder)[-1]["eval/return"]) for folder in folders)
        assert scaled == pytest.approx(one * factor, rel=1e-3)


@both_scripts
def test_no_step_of_experience_is_lost(script):
    folder = small_run(script, env_id="Point-v0", eval_interval=28, total_timesteps=168, eval_episodes=1)
    at_evaluations = [row for row in rows_of(folder) if row["eval/success"]]
    assert [row["charts/buffer_size"] == row["global_step"] for row in at_evaluations] == [True] * 7
    left = states_of(folder)["buffer"]["steps"][:, -1]  # of an episode of 20, and of one cut off after 8
    assert (left == 20).sum() == 6 and (left == 8).sum() == 12


@pytest.mark.parametrize(("script", "every"), [(poco, 1), (ogpo, 2)], ids=SCRIPTS)
def test_a_run_killed_in_any_write_and_resumed_ends_as_undisturbed(script, every, monkeypatch):
    writes, last = [], 10**9

    def interrupt(owner, name, half):
        honest = getattr(owner, name)

        def write(*given):
            writes.append(name)
            if len(writes) > last:
                half(*given)
                raise GeneratorExit  # stands for SIGKILL: nothing handles it
            return honest(*given)
        monkeypatch.setattr(owner, name, write)

    interrupt(script, "save_file", lambda path, *_: path.with_suffix(".tmp").write_bytes(b"PK"))
    interrupt(script.Run, "write_row", lambda run, *_: (run.folder / "metrics.csv").write_text("global_s"))
    settings = write_demos(5) | {"bc_steps": 2, "hidden_dim": 8, "batch_size": 4, "total_timesteps": 66}
    settings |= {"eval_interval": 33, "log_interval": 33, "critic_warmup": 3, "eval_episodes": 1}
    whole = small_run(script, "whole", **settings)
    assert len(writes) >= 10
    for kill in range(2, len(writes), every):  # the third write is that of the first checkpoint
        writes, last = [], kill
        with pytest.raises(GeneratorExit):
            small_run(script, str(kill), **settings)
        (folder,), last = Path(str(kill), "runs").iterdir(), 10**9
        if kill == 2:
            assert main(script, "--resume", folder) == 2
            continue
        assert main(script, "--resume", folder) == 0
        assert rows_of(folder) == rows_of(whole) and same(states_of(folder), states_of(whole))


def test_what_is_typed_beside_resume_counts(capsys):
    folder, typed = small_run(poco), {"gamma": 0.5, "learning_rate": 0.01}
    rows = rows_of(folder)
    assert main(poco, "--resume", folder, "--hidden-dim", 32) == 2
    assert "does not fit these arguments" in capsys.readouterr().err and rows_of(folder) == rows
    assert main(poco, "--resume", folder, **typed, total_timesteps=360) == 0
    assert rows_of(folder)[: len(rows)] == rows and rows_of(folder)[-1]["global_step"] == "360"
    args, _ = poco.read_file(folder / "checkpoint.pt")
    assert vars(args).items() >= (typed | {"batch_size": 32}).items()
    assert states_of(folder)["q_optimizer"]["param_groups"][0]["lr"] == 0.01


def test_a_run_is_resumed_by_its_own_script_with_its_own_data(capsys):
    folder = small_run(poco, total_timesteps=60)
    assert main(ogpo, "--resume", folder) == 2
    assert f"resume this run with python poco.py --resume {folder}" in capsys.readouterr().err
    for option in ("--dataset", "--policy", "--env-id"):
        assert main(poco, "--resume", folder, option, "demos") == 2
        assert f"--resume: {option[2:].replace('-', '_')} " in capsys.readouterr().err
    (folder / "checkpoint.pt").unlink()
    assert main(poco, "--resume", folder) == 2 and len(list(folder.iterdir())) == 3


def test_an_exclusive_environment_that_draws_from_numpy_is_closed_and_resumes_exactly():
    whole = small_run(poco, "whole", env_id="Exclusive-v0")
    half = small_run(poco, "half", env_id="Exclusive-v0", total_timesteps=150)
    assert main(poco, "--resume", half, "--total-timesteps", 300) == 0
    assert rows_of(half) == rows_of(whole) and same(states_of(half), states_of(whole))
    assert Exclusive.held == 0


@both_scripts
def test_demonstrations_stay_in_the_buffer_and_none_are_in_ogpo_s(script, monkeypatch):
    demo = Trajectory(np.full((5, 3), 0.5), np.zeros((4, 2)), np.zeros(4), True, 1.0)
    update = mock.Mock(return_value={})
    monkeypatch.setattr(script, "load_demonstrations", lambda args, env: [demo] * 10)
    monkeypatch.setattr(script, "update_critic", update)
    small_run(script, dataset="demos", bc_steps=1)
    shares = [(call.args[4].obs[:, 1] == 0.5).float().mean().item() for call in update.call_args_list]
    assert set(shares[:60]) == {1.0}  # offline
    expected = 40 / 330 if script is poco else 0.0  # 300 steps, some of them in an unfinished episode
    assert np.mean(shares[-20:]) == pytest.approx(expected, abs=expected / 3)


@both_scripts
@pytest.mark.parametrize("n, bc_steps", [(142, 10_000), (143, 10_000), (600, 12_600), (1000, 20_000)])
def test_cloning_follows_the_number_of_observations(script, n, bc_steps):
    networks = mock.Mock(side_effect=KeyboardInterrupt)  # gets the arguments, and stops the run
    with pytest.raises(KeyboardInterrupt):
        script.train(script.Args(**write_demos(n)), networks)  # n times 21 observations
    args = networks.call_args.args[0]
    assert (args.bc_steps, args.dropout) == (bc_steps, 0.1 if n == 142 else 0)


@both_scripts
def test_a_run_begins_with_the_other_script_s_policy(script, capsys):
    other, data = poco if script is ogpo else ogpo, write_demos()
    clone = small_run(other, "clone", total_timesteps=60, bc_steps=10, **data) / "clone.pt"
    assert main(script, "--policy", clone, "--hidden-dim", 8) == 2
    assert "does not fit" in capsys.readouterr().err and not Path("runs").exists()
    assert main(script, "--policy", clone, critic_warmup=0, utd_ratio=0, best_of_n=2) == 0
    (begun,) = Path("runs").iterdir()
    files = [torch.load(path, weights_only=True) for path in (clone, begun / "clone.pt", begun / "policy.pt")]
    assert all(same(files[0][name], file[name]) for name in ("policy", "critic") for file in files[1:])
    args, *_ = script.load_policy(begun / "policy.pt")
    assert (args.hidden_dim, args.best_of_n, args.gamma, args.dropout) == (16, 2, 0.9, 0.1)  # 20 steps


@both_scripts
@pytest.mark.parametrize("where", ["critic_loss", "bc_loss"])
def test_a_nan_loss_stops_the_run_before_it_writes_anything(script, where, monkeypatch, capsys):
    owner, factors = script if where == "critic_loss" else script.FlowPolicy, iter([1.0] * 19 + [torch.nan])
    honest = getattr(owner, where)
    monkeypatch.setattr(owner, where, lambda *args: honest(*args) * next(factors, 1.0))
    assert main(script, bc_steps=30, **(RUN | write_demos())) == 2
    assert "became NaN" in capsys.readouterr().err and not Path("runs").exists()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_changes_no_weight(wrong):
    layer = torch.nn.Linear(3, 2)
    before, optimizer = copy.deepcopy(layer.state_dict()), torch.optim.Adam(layer.parameters())
    with pytest.raises(poco.UserError, match="NaN"):
        poco.gradient_step(optimizer, layer(torch.ones(1, 3)).sum() * wrong)
    assert same(before, layer.state_dict()) and not optimizer.state


@both_scripts
def test_a_poor_clone_improves(script):
    """Of demonstrations half of which stay where they are."""
    settings = {"bc_steps": 300, "hidden_dim": 32, "batch_size": 64, "critic_warmup": 150}
    settings |= {"total_timesteps": 1600, "eval_interval": 1600, "utd_ratio": 0.25, "eval_episodes": 50}
    rows = rows_of(small_run(script, seed=4, **settings, **write_demos(gains=(5.0, 0.0))))
    clone, tuned = (float(row["eval/return"]) for row in rows if row["eval/return"])
    assert clone < -16 and tuned > clone + 0.8  # of steps away from the goal


# Other policies
class Diffusion(FlowPolicy):
    """A small DDPM over chunks, whose network predicts the noise."""
    kept = torch.cumprod(1 - torch.linspace(0.02, 0.6, 8), dim=0)

    def bc_loss(self, features, chunk, valid=None):
        level, noise = torch.randint(8, (len(chunk), 1)), torch.randn_like(chunk)
        x = self.kept[level].sqrt() * chunk + (1 - self.kept[level]).sqrt() * noise
        return ((self.velocity(features, x, level / 8) - noise) ** 2).mean(1)

    def sample(self, features, flow_steps=None):
        x = torch.randn(len(features), self.chunk_dim)
        for level in reversed(range(8)):
            kept, before = self.kept[level], self.kept[level - 1] if level else torch.ones(())
            noise = self.velocity(features, x, torch.full_like(x[:, :1], level / 8))
            chunk = ((x - (1 - kept).sqrt() * noise) / kept.sqrt()).clamp(-1, 1)
            x = before.sqrt() * chunk + (1 - before).sqrt() * noise
        return chunk


@pytest.mark.parametrize("kind", ["diffusion", "frozen backbone"])
def test_train_takes_other_networks(kind):
    def make_networks(args, obs_space, action_dim):
        flow, critic = poco.make_networks(args, obs_space, action_dim)
        policy = Diffusion(flow.encode, flow.chunk_dim, 64)
        if kind == "frozen backbone":
            backbone = torch.nn.Linear(2, 8).requires_grad_(False)
            encode = torch.nn.Sequential(flow.encode, backbone, torch.nn.Tanh())
            encode.feature_dim = 8
            policy = FlowPolicy(encode, flow.chunk_dim, 32)
        return policy, critic

    settings = {"bc_steps": 400, "eval_episodes": 50, "total_timesteps": 150}
    poco.train(Args(**(RUN | settings | write_demos())), make_networks)
    (folder,) = Path("runs").iterdir()
    clone, tuned = (float(row["eval/success"]) for row in rows_of(folder) if row["eval/success"])
    assert clone > 0.4 and tuned > 0.4  # chance is 10 %
    files = folder / "clone.pt", folder / "policy.pt"
    initial, final = (poco.load_policy(file, make_networks=make_networks)[1] for file in files)
    for (name, before), after in zip(initial.named_parameters(), final.parameters(), strict=True):
        assert torch.equal(before, after) == name.startswith("encode"), name  # frozen, or trained


def test_updates_take_several_groups_of_parameters():
    policy, critic, batch = new_policy(3, 4), new_critic(3, 4, 2), random_batch(16, 3, 2, 2)
    first, *others = copy.deepcopy(list(policy.parameters())), *policy.parameters()
    groups = [{"params": others[:2], "lr": 0.1}, {"params": others[2:]}]
    args = Args(num_candidates=2, posterior_batch_size=4, chunk_size=2)
    poco.update_policy(policy, critic, torch.optim.AdamW(groups, lr=1e-3), batch, args)
    moved = [(old - new).abs().max() for old, new in zip(first, others, strict=True)]
    assert moved[0] > 0.05 and 0 < moved[-1] < 2e-3


# The command line, as a user types it
FAULTY = {
    "Nan-v0": "Nan-v0: no episode of the evaluation is usable", "CartPole-v1": "Discrete",
    "InfoNone-v0": "AttributeError, 'NoneType'", "SuccessText-v0": "ValueError, could not convert",
    "SuccessSeveral-v0": "ValueError, can only convert an array", "SuccessNamed-v0": "not 'dict'",
    "RewardNone-v0": "RewardNone-v0 failed in step, which returns observation, reward, terminated",
    "OldReset-v0": "OldReset-v0 failed in reset, which returns observation and info: ",
    "PartOfAnObservation-v0": "PartOfAnObservation-v0 failed in step", "Huge-v0": "an action has no bounds",
    "Raises-v0": "and an info with numbers: ConnectionError, the robot", "no_such:Own-v0": "no_such",
    "RaisesInReset-v0": "and info: ConnectionError, the robot", "OneValue-v0": "no bounds, or low ==",
    "NoBounds-v0": "cannot be used: ", "Sequence-v0": "cannot be used: ", "Countin-v0": "Did you mean",
}  # fmt: skip
BAD_INPUT = {
    "--env-id FetchReach-v4 --chunk-size 51": "no episode lasts a chunk",
    "--env-id FetchPickAndPlac-v4": "Did you mean", "--env-id Pendulum-v1": "npz cannot be used",
    "--dataset no.npz": "no.npz", "--evaluate no.pt": "no.pt", "--resume nowhere": "nowhere",
    "--policy no.pt": "no.pt", "--no-such 1": "no-such", "ogpo --posterior-coef 1": "posterior-coef",
    "--success-at start": "any", "--buffer-size 100": "--batch-size",
}  # fmt: skip
WRONG = ["--effective-samples 2", f"--buffer-size {10**22}", "--tau 1.5", "--eval-interval 0", "--num-envs 0"]
WRONG += ["--num-candidates 1", "--temperature nan", "--temperature 0", "--dropout 1.5", "--num-demos 0"]
WRONG += ["--batch-size 0", "--clip-threshold 0", "ogpo --policy-tau 2", "ogpo --success-coef -1"]
WRONG += ["ogpo --group-size 1", "ogpo --sigma 0", "--td-steps 0"]
BAD_INPUT |= {typed: typed.split()[-2] for typed in WRONG}


@pytest.mark.parametrize("case", [*FAULTY, *BAD_INPUT])
def test_bad_input_or_a_faulty_environment_gets_a_sentence_and_status_2(case, capsys):
    faulty = as_typed(**(RUN | {"env_id": case, "total_timesteps": "900"}))
    typed = faulty if case in FAULTY else case.removeprefix("ogpo ").split()
    assert main(ogpo if case.startswith("ogpo") else poco, *typed) == 2
    err = capsys.readouterr().err
    assert (FAULTY | BAD_INPUT)[case] in err and "Traceback" not in err and ".py" in err
    assert case in FAULTY or list(Path().iterdir()) == []


@pytest.mark.parametrize("typed, package", [("--capture-video", "moviepy"), ("--dataset a", "minari")])
def test_a_missing_optional_package_is_named(typed, package, monkeypatch, capsys):
    monkeypatch.setattr(poco.importlib.util, "find_spec", lambda name: None)
    assert main(poco, *as_typed(**RUN), *typed.split()) == 2
    assert f"pip install {package}" in capsys.readouterr().err.replace('"', "")


def start(*command, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], env=environment, **pipes, **options)


def test_a_fetch_task_runs_as_readme_says():
    typed = "--env-id FetchReach-v4 --num-demos 10 --bc-steps 100 --total-timesteps 200 --eval-interval 200"
    typed += " --critic-warmup 10 --utd-ratio 0.1 --eval-episodes 4 --hidden-dim 64"
    process = start(poco.__file__, *typed.split())
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "demonstrations: 10 of 200, success 1.00" in out, err
    results = re.findall(r"step \d+: (success .*)", out)
    (command,) = set(re.findall(r"python poco.py (--evaluate .*)", out))
    again, err = start(poco.__file__, *command.split()).communicate(timeout=240)
    assert len(results) == 2 and results[1] in again, err


@pytest.mark.parametrize(("script", "signal_"), [(poco, signal.SIGINT), (ogpo, signal.SIGTERM)], ids=SCRIPTS)
def test_ctrl_c_and_sigterm_exit_with_130_and_the_command_that_goes_on(script, signal_):
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # background jobs ignore it
    settings = {"env_id": "test_poco:Counting-v0", "total_timesteps": 10**7, "eval_interval": 1500}
    process = start(script.__file__, *as_typed(**(RUN | settings)), preexec_fn=heed)
    deadline = time.monotonic() + 120
    while not list(Path().glob("runs/*/policy.pt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    process.send_signal(signal_)
    out, err = process.communicate(timeout=60)
    (folder,) = Path("runs").iterdir()
    assert process.returncode == 130 and "Traceback" not in err
    assert f"python {script.METHOD}.py --resume {folder}\n" in out
    assert script.load_policy(folder / "policy.pt")[0].env_id == "test_poco:Counting-v0"


def test_a_full_disk_ends_with_a_sentence_and_the_last_checkpoint():
    typed = "--env-id test_poco:Counting-v0 --dataset none --hidden-dim 16 --total-timesteps 1000"
    typed += " --eval-interval 200 --eval-episodes 1 --utd-ratio 0.01"
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (80_000, 80_000))  # they grow
    process = start(poco.__file__, *typed.split(), preexec_fn=limit)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 2 and "too large" in err and "Traceback" not in err
    (checkpoint,) = Path("runs").glob("*/checkpoint.pt")
    assert "--resume runs/" in out and 0 < poco.read_file(checkpoint)[1]["step"] < 1000


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("code_was_run",))


def load_demos(args):
    return poco.load_demonstrations(args, poco.Environment(args, first_seed=0))


@pytest.mark.parametrize("damage", ["cut", "empty", "malicious", "not a dictionary", "another environment"])
def test_a_damaged_policy_file_gets_a_sentence(damage):
    path = small_run(poco, total_timesteps=60) / "policy.pt"
    content, whole = torch.load(path, weights_only=True), path.read_bytes()
    of_another = content | {"args": content["args"] | {"env_id": "FetchReach-v4"}}
    contents = {"malicious": content | {"policy": Malicious()}, "another environment": of_another}
    torch.save(contents.get(damage, [1, 2]), path)
    if damage in ("cut", "empty"):
        path.write_bytes(whole[: 5000 * (damage == "cut")])
    with pytest.raises(poco.UserError, match="policy.pt"):
        poco.load_policy(path)
    assert not Path("code_was_run").exists()


# Speed without another meaning
def test_bfloat16_gives_nearly_the_same_update(monkeypatch):
    results, args = [], Args(chunk_size=2, num_candidates=4, gamma=0.9)
    for hardware in (False, True):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": hardware})
        torch.manual_seed(0)
        policy, critic, batch = new_policy(3, 4), new_critic(3, 4, 2), random_batch(64, 3, 2, 2)
        adam = [torch.optim.Adam(network.parameters(), fused=True) for network in (policy, critic)]
        metrics = poco.update_critic(policy, critic, copy.deepcopy(critic), adam[1], batch, args)
        metrics |= poco.update_policy(policy, critic, adam[0], batch, args)
        names = ["losses/qf_loss", "losses/actor_loss", "losses/actor_grad_norm", "losses/effective_samples"]
        results.append([metrics[name].item() for name in names])
        assert all(weight.dtype == weight.grad.dtype == torch.float32 for weight in policy.parameters())
    assert results[0] != results[1] and results[0] == pytest.approx(results[1], rel=0.05)


# Data
@pytest.fixture
def recorded():
    """The arguments for six episodes of Counting in a file, those episodes, and the file's columns."""
    episodes, rows, rng = [], [], np.random.default_rng(0)
    for seed, n in enumerate((4, 5, 6, 5, 4, 7)):
        obs = np.stack([np.arange(n + 1.0), np.full(n + 1, seed), np.zeros(n + 1)], axis=1)
        ends, actions, rewards = np.arange(n) == n - 1, rng.uniform(-1, 1, (n, 2)), rng.normal(size=n)
        episodes.append(Trajectory(obs, actions, rewards, n % 2 == 0, float(n == 5)))
        typed = np.array([0, -4]) + (actions + 1) / 2 * np.array([10, 8])  # in their own range
        rows.append([obs[:-1], obs[1:], rewards, typed, ends * (n % 2 == 0), ends * (n % 2), ends * (n == 5)])
    keys = ["observations", "next_observations", "rewards", "actions", "terminals", "timeouts", "success"]
    columns = [1.0 * np.concatenate(parts) for parts in zip(*rows, strict=True)]
    data = dict(zip(keys, columns, strict=True))
    np.savez("data.npz", **data)
    return Args(env_id="Counting-v0", chunk_size=2, dataset="data.npz"), episodes, data


def assert_same_episodes(a, b):
    for x, y in zip(a, b, strict=True):
        for name in ("obs", "actions", "rewards", "terminated", "success"):
            assert_allclose(getattr(x, name), getattr(y, name), atol=1e-6)


def test_a_file_gives_the_episodes_in_it(recorded):
    assert_same_episodes(load_demos(recorded[0]), recorded[1])


def test_without_next_observations_the_row_at_a_cut_only_shows_the_end(recorded):
    args, episodes, data = recorded
    del data["next_observations"]
    data["terminals"][-1] = data["timeouts"][-1] = 0  # the last episode is unfinished
    np.savez(args.dataset, **data)
    for episode, whole in zip(load_demos(args), episodes, strict=True):
        n = len(whole.actions) - (not whole.terminated)
        assert len(episode.actions) == n and len(episode.obs) == n + 1
        assert_allclose(episode.obs[:n], whole.obs[:n], atol=1e-6)


def test_success_of_a_file_s_episodes_can_be_that_of_any_step(recorded):
    np.savez("data.npz", **(recorded[2] | {"success": np.arange(31) == 0}))
    assert poco.mean_success(load_demos(poco.replace(recorded[0], success_at="any"))) == pytest.approx(1 / 6)


def test_num_demos_are_drawn_by_the_seed(recorded):
    args, episodes, _ = recorded
    drawn = set()
    for seed in range(30):
        demos = load_demos(poco.replace(args, num_demos=2, seed=seed))
        drawn.add(tuple(int(demo.obs[0, 1]) for demo in demos))
        assert_same_episodes(demos, [episodes[int(demo.obs[0, 1])] for demo in demos])
    assert len(drawn) > 8 and set(sum(drawn, ())) == set(range(6))


WRONG_DATA = {  # what is changed: how, and words of the sentence
    "rewards": (lambda x: x[1:], "columns differ in their numbers of rows"),
    "actions": (lambda x: x[:, :1], "cannot reshape"),
    "actions beyond": (lambda x: np.vstack([x[:-1], [11.5, 0]]), "leave their box by 15.0%"),
    "terminals timeouts": (lambda x: 0 * x, "mark no end"),
    "timeouts": (lambda x: 1 + 0 * x, "no episode lasts a chunk"),
    "rewards objects": (lambda x: np.array([Malicious()] * len(x)), "Object arrays"),
    "observations next_observations": (lambda x: x + [[np.nan, 0, 0]], "episode 0 has NaN or infinity"),
    "observations": (lambda x: x[::-1], "row 0: next_observations are not the next row's"),
    "terminals": (lambda x: 0 * x, "row 3: next_observations are not the next row's"),
    "file cut": (lambda content: content[:999], "data.npz"), "file empty": (lambda content: b"", "data.npz"),
    "file text": (lambda content: b"hello", "data.npz"),
    "file pickle": (lambda content: pickle.dumps(Malicious()), "data.npz"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_DATA)
def test_wrong_data_gets_a_sentence(case, recorded, capsys):
    args, _, data = recorded
    change, words = WRONG_DATA[case]
    changed = {key: change(column) if key in case.split() else column for key, column in data.items()}
    np.savez(args.dataset, **changed)
    if case.startswith("file"):
        Path("data.npz").write_bytes(change(Path("data.npz").read_bytes()))
    assert main(poco, **(RUN | {"dataset": args.dataset})) == 2
    assert words in capsys.readouterr().err and not Path("code_was_run").exists()


def test_an_episode_beyond_the_environment_s_limit_is_refused():
    options, data = write_demos(3), dict(np.load("demos.npz"))
    del data["next_observations"]
    np.savez("demos.npz", **(data | {"timeouts": np.arange(60) == 59}))
    with pytest.raises(poco.UserError, match="episode 0 exceeds the environment's 20 steps"):
        load_demos(Args(**options))


def test_files_of_another_kind_are_named(capsys):
    assert main(poco, "--dataset", "data.hdf5", **(RUN | {"dataset": "data.hdf5"})) == 2
    assert "data.hdf5 cannot be used: benchmark/README.md converts other files" in capsys.readouterr().err
    checkpoint = small_run(poco, total_timesteps=60) / "checkpoint.pt"
    assert main(poco, "--policy", checkpoint) == main(poco, "--evaluate", checkpoint) == 2
    assert capsys.readouterr().err.count("checkpoint.pt is no policy: take policy.pt or clone.pt") == 2


def test_demonstrations_have_room_of_their_own(monkeypatch):
    goals = set()
    update = lambda policy, optimizer, batch: goals.update(batch.obs[:, 1].tolist()) or {}
    monkeypatch.setattr(poco, "update_clone", update)
    small_run(poco, buffer_size=32, bc_steps=40, total_timesteps=30, **write_demos(24))
    assert len(goals) == 24


@pytest.mark.parametrize(("env_id", "success"), [("Reach", 1.0), ("Push", 0.87), ("PickAndPlace", 0.93)])
def test_demos_are_in_the_repository(env_id, success):
    assert len(load_demos(Args(env_id=f"Fetch{env_id}-v4"))) == 30
    demos = load_demos(Args(env_id=f"Fetch{env_id}-v4", num_demos=200))
    assert len(demos) == 200 and all(len(demo.actions) == 50 for demo in demos)
    assert poco.mean_success(demos) == pytest.approx(success, abs=0.006)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", ["FrankaKitchen-v1", "Camera-v0"])
def test_minari_dataset(env_id, tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    collector = minari.DataCollector(gym.make(env_id, max_episode_steps=12))
    space = collector.unwrapped.observation_space
    pack = Layout(space).pack if env_id == "Camera-v0" else functools.partial(gym.spaces.flatten, space)
    episodes, actions = [], np.random.default_rng(0).uniform(-1, 1, (3, 12, *collector.action_space.shape))
    for seed in range(3):
        first, steps = collector.reset(seed=seed), [collector.step(action) for action in actions[seed]]
        obs, rewards = [pack(step[0]) for step in (first, *steps)], [step[1] for step in steps]
        episodes.append(Trajectory(np.array(obs), actions[seed], np.array(rewards), False, np.nan))
    about = {"author": "a", "author_email": "a@b.c", "code_permalink": "-", "algorithm_name": "random"}
    collector.create_dataset(dataset_id="test/own-v0", **about)
    args = Args(env_id=env_id, dataset="test/own-v0")
    demos = load_demos(args)
    if env_id == "Camera-v0":  # Minari keeps images as JPEG; another row's would differ by 30
        for i, episode in enumerate(episodes):
            assert np.abs(demos[i].obs - episode.obs.astype(float)).mean() < 8
            demos[i] = demos[i]._replace(obs=episode.obs)
    assert_same_episodes(demos, episodes)
    for wrong in ({"env_id": "FetchReach-v4"}, {"dataset": "nothing/here-v0"}):
        with pytest.raises(poco.UserError, match="cannot be used"):
            load_demos(poco.replace(args, **wrong))


@pytest.mark.parametrize(("success_at", "expected"), [("end", 0), ("any", 1)])
def test_success_in_minari_is_read_as_in_an_environment(success_at, expected, monkeypatch):
    arrays = {"observations": np.zeros((4, 3)), "actions": np.zeros((3, 2)), "rewards": np.zeros(3)}
    infos = {"is_success": [0, 1, 0], "success": [1, 1, 1]}
    episode = types.SimpleNamespace(**arrays, terminations=np.zeros(3), infos=infos)
    dataset = types.SimpleNamespace(observation_space=Box(-1, 1, (3,)), iterate_episodes=lambda: [episode])
    minari = types.SimpleNamespace(load_dataset=lambda dataset_id, download: dataset)
    monkeypatch.setitem(sys.modules, "minari", minari)
    monkeypatch.setattr(poco.importlib.util, "find_spec", lambda name: minari)
    (read,) = poco.read_minari("a/b-v0", types.SimpleNamespace(success_at=success_at))
    assert read.success == expected


def test_ogbench_data_end_where_the_task_is_solved(tmp_path, monkeypatch):
    """Two trajectories of play in the package's file layout; the task is solved in row 4 of the second."""
    pytest.importorskip("ogbench")
    monkeypatch.setenv("HOME", str(tmp_path))  # where the package keeps its data
    folder = tmp_path / ".ogbench/data"
    folder.mkdir(parents=True)
    solved = gym.make("ogbench:cube-single-singletask-task1-v0")
    solved.reset()
    goal = solved.unwrapped._data.mocap_pos[0]
    rng = np.random.default_rng(0)
    ends = np.arange(24) % 12 == 11
    columns = {"observations": rng.normal(size=(24, 28)), "actions": rng.uniform(-1, 1, (24, 5))}
    columns |= {"terminals": ends, "qpos": np.full((24, 21), 9.0), "qvel": np.zeros((24, 20))}
    columns["qpos"][16, 14:17] = goal
    for suffix in ("", "-val"):
        np.savez(folder / f"cube-single-play-v0{suffix}.npz", **columns)
    name = "cube-single-play-singletask-task1-v0"
    demos = load_demos(Args(env_id=f"ogbench:{name.replace('-play', '')}", dataset=f"ogbench:{name}"))
    obs = columns["observations"].astype(np.float32)
    expected = [(0, 11, False), (12, 17, True), (17, 23, False)]  # the last row of 12 is no step
    for demo, (start, end, terminated) in zip(demos, expected, strict=True):
        np.testing.assert_array_equal(demo.obs, obs[start : end + 1])
        np.testing.assert_allclose(demo.actions, columns["actions"][start:end], atol=1e-6)
        np.testing.assert_array_equal(demo.rewards, np.where(np.arange(start, end) == 16, 0, -1))
        assert demo.terminated == terminated


# Images
SPACES = {"image": Box(0, 255, (40, 44, 3), np.uint8), "stack": Box(0, 255, (2, 40, 44, 3), np.uint8)}
SPACES["dict"] = gym.spaces.Dict(SPACES | {"state": Box(-1, 1, (5,), np.float32)})


def rows_from(space, n=6):
    """Returns: the layout, observations by their parts, and their rows."""
    layout, observations = Layout(space), [space.sample() for _ in range(n)]
    rows = torch.from_numpy(np.array([layout.pack(obs) for obs in observations]))
    if not isinstance(space, gym.spaces.Dict):
        observations = [{"": obs} for obs in observations]
    return layout, {name: np.array([obs[name] for obs in observations]) for name in observations[0]}, rows


@pytest.mark.parametrize("kind", SPACES)
def test_a_row_holds_an_observation_exactly(kind):
    layout, parts, rows = rows_from(SPACES[kind])
    vectors, images = layout.split(rows)
    assert rows.dtype == torch.uint8 and rows.shape == (6, layout.size)
    assert np.array_equal(vectors, parts.pop("state", np.zeros((6, 0))))
    for part, image in zip(parts.values(), images, strict=True):
        assert np.array_equal(image, part.reshape(image.shape)) and image.shape[-3:] == part.shape[-3:]


def test_each_image_is_shifted_as_by_padding_and_cropping_and_vectors_are_not():
    layout, _, rows = rows_from(SPACES["dict"], n=60)
    shifted = layout.shift(rows.clone())
    (before, images), (after, moved), offsets = layout.split(rows), layout.split(shifted), []
    assert torch.equal(before, after)
    for image, other in zip(images, moved, strict=True):
        for a, b in zip(image.numpy(), other.numpy(), strict=True):
            padded = np.pad(a, [(0, 0), (4, 4), (4, 4), (0, 0)], mode="edge")
            crops = {(y, x): padded[:, y : y + 40, x : x + 44] for y in range(9) for x in range(9)}
            (offset,) = (place for place, crop in crops.items() if np.array_equal(crop, b))
            offsets.append(offset)
    down, right = zip(*offsets)
    assert set(down) == set(right) == set(range(9)) and len(set(offsets)) > 40


def test_features_of_images_are_the_expected_positions_of_two_convolutions():
    _, parts, rows = rows_from(SPACES["dict"])
    encode = Encoder(SPACES["dict"])
    encode.mean.uniform_(-1, 1)
    expected = [parts["state"] - encode.mean.numpy()]
    for layers, name in zip(encode.convolutions, ("image", "stack"), strict=True):
        w = {key: value.double().numpy() for key, value in layers.state_dict().items()}
        x = parts[name].reshape(6, -1, 40, 44, 3).transpose(0, 1, 4, 2, 3).reshape(6, -1, 40, 44) / 255
        for layer, (size, stride) in zip((0, 2), ((8, 4), (4, 2)), strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(2, 3))
            windows = windows[:, :, ::stride, ::stride]
            x = np.einsum("bchwij,ocij->bohw", windows, w[f"{layer}.weight"])
            x = np.maximum(x + w[f"{layer}.bias"][:, None, None], 0)
        weights = np.exp(x) / np.exp(x).sum((2, 3), keepdims=True)
        rows_and_columns = np.meshgrid(*(np.linspace(-1, 1, size) for size in x.shape[2:]), indexing="ij")
        places = np.einsum("bchw,phw->bcp", weights, rows_and_columns)
        expected.append(places.reshape(6, -1))
    assert_allclose(encode(rows).detach(), np.hstack(expected), atol=1e-4)
    spot = torch.zeros(1, 1, 5, 9)
    spot[..., 1, 8] = 100.0  # the second row, the last column
    assert_allclose(poco.spatial_softmax(spot), [[-0.5, 1.0]])


@pytest.mark.parametrize("shape", [(3, 64, 64), (20, 19, 3), (4, 84, 84), (64, 64, 5)])
def test_images_of_other_shapes_get_a_sentence(shape):
    with pytest.raises(poco.UserError, match="images are .H, W, C., 20 pixels or more, but not"):
        Layout(gym.spaces.Dict({"camera": Box(0, 255, shape, np.uint8)}))


def test_where_opengl_is_missing_the_sentence_says_what_to_set():
    with pytest.raises(poco.UserError, match="platform library.*set MUJOCO_GL=egl"), poco.explained("it"):
        raise RuntimeError("an OpenGL platform library has not been loaded into this process")


def test_a_buffer_of_images_takes_a_byte_a_color():
    layout = Layout(Box(0, 255, (64, 64, 3), np.uint8))
    buffer = ReplayBuffer(Args(), types.SimpleNamespace(layout=layout, action_dim=4), 20_400)
    assert buffer.obs.nbytes + buffer.steps.nbytes < 260e6


@both_scripts
def test_features_are_computed_once_a_state_without_shifts_in_acting(script, monkeypatch):
    space = SPACES["dict"]
    args = script.Args(chunk_size=2, batch_size=8)
    policy, critic = script.make_networks(args, space, 2)
    _, _, obs = rows_from(space, 8)
    batch = random_batch(8, 1, 2, 2)._replace(obs=obs, next_obs=obs)
    optimizer = torch.optim.Adam(policy.parameters())
    policy.encode.forward = mock.Mock(wraps=policy.encode.forward)
    critic.encode.forward = mock.Mock(wraps=critic.encode.forward)
    if script is ogpo:
        actors = (policy, copy.deepcopy(policy), None)
        ogpo.update_policy(*actors, critic, optimizer, batch, None, args)
    else:
        poco.update_policy(policy, critic, optimizer, batch, args)
    assert policy.encode.forward.call_count == critic.encode.forward.call_count == 1
    assert any(weight.grad.abs().max() > 0 for weight in policy.encode.parameters())
    monkeypatch.setattr(Layout, "shift", lambda self, rows: 1 / 0)
    script.choose_chunk(policy, critic, obs[0].numpy(), 3)


class Camera(Point):
    """Point-v0 seen by a camera: the point in red, the goal in green; and the goal as a number."""
    camera = Box(0, 255, (36, 40, 3), np.uint8)
    observation_space = gym.spaces.Dict({"camera": camera, "goal": Box(-1, 1, (1,))})

    def see(self, obs):
        image = np.zeros((36, 40, 3), np.uint8)
        for color, x in enumerate(obs):
            column = int(np.clip(18 + 16 * x, 0, 36))
            image[:, column : column + 4, color] = 255
        return {"camera": image, "goal": obs[1:].astype(np.float32)}

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return self.see(obs), info

    def step(self, action):
        obs, *others = super().step(action)
        return self.see(obs), *others


gym.register("Camera-v0", f"{__name__}:Camera", max_episode_steps=20)


def write_camera_demos(n):
    """write_demos for Camera-v0."""
    options, data = write_demos(n), dict(np.load("demos.npz"))
    for key in ("observations", "next_observations"):
        seen = [Camera().see(obs) for obs in data.pop(key)]
        data |= {f"{key}/{name}": np.array([parts[name] for parts in seen]) for name in ("camera", "goal")}
    np.savez("demos.npz", **data)
    return options | {"env_id": "Camera-v0", "bc_steps": 20, "critic_warmup": 5, "batch_size": 16}


@both_scripts
def test_a_run_with_images_whose_policy_waits_is_resumed_exactly(script):
    settings = write_camera_demos(6) | {"policy_start": 40, "eval_interval": 40}
    whole = small_run(script, "whole", **settings, total_timesteps=80)
    half = small_run(script, "half", **settings, total_timesteps=40)
    before, after = (torch.load(half / name, weights_only=True) for name in ("clone.pt", "policy.pt"))
    assert same(before["policy"], after["policy"]) and not same(before["critic"], after["critic"])
    assert main(script, "--resume", half, "--total-timesteps", 80) == 0
    assert rows_of(whole) == rows_of(half) and same(states_of(whole), states_of(half))


# Pictures, README
@pytest.mark.skipif(not os.environ.get("MUJOCO_GL"), reason="pictures need MUJOCO_GL=egl or osmesa")
def test_capture_video():
    pytest.importorskip("moviepy")
    folder = small_run(poco, env_id="FetchReach-v4", total_timesteps=150, capture_video=True)
    assert len(list(folder.glob("videos/step 0*/*.mp4"))) >= 2 and list(folder.glob("videos/step 150*/*.mp4"))


class Resnet(torch.nn.Module):
    """In the place of torchvision's."""
    def __init__(self, weights):
        super().__init__()
        self.conv, self.fc = torch.nn.Conv2d(3, 512, 36), torch.nn.Linear(512, 9)

    def forward(self, image):
        return self.fc(self.conv(image).mean((2, 3)))


def test_the_frozen_backbone_as_documented_is_not_trained(monkeypatch):
    torchvision = types.SimpleNamespace(models=types.SimpleNamespace(resnet18=Resnet))
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    readme = (ROOT / "benchmark/README.md").read_text()
    (code,) = re.findall(r"```python\n(import poco\n.+?)```", readme, flags=re.DOTALL)
    run = mock.Mock()
    monkeypatch.setattr(poco, "main", run)
    monkeypatch.setattr(poco, "METHOD", "poco")
    exec(code, {})
    (make_networks,) = run.call_args.args
    options = write_camera_demos(6) | {"total_timesteps": 40, "policy_start": 0}
    poco.train(Args(**(RUN | options)), make_networks)
    (folder,) = Path("runs").iterdir()
    files = folder / "clone.pt", folder / "policy.pt"
    initial, final = (poco.load_policy(file, make_networks=make_networks)[1] for file in files)
    for (name, before), after in zip(initial.named_parameters(), final.parameters(), strict=True):
        assert torch.equal(before, after) == name.startswith("encode"), name  # frozen, or trained


def test_readme_names_only_what_is_there():
    readme = (ROOT / "README.md").read_text()
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", readme):
        assert link.startswith("http") or (ROOT / link).exists(), link
    options = {name for script in SCRIPTS.values() for name in vars(script.Args())}
    named = set(re.findall(r"--([a-z][a-z0-9-]+)", readme)) - {"help"}
    assert {option.replace("-", "_").removeprefix("no_") for option in named} <= options
    for name in set(re.findall(r"`([a-z_]+)\(", readme)) - {"sqrt"}:
        assert any(hasattr(owner, name) for owner in (poco, ogpo, FlowPolicy, ogpo.FlowPolicy)), name
