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
        monkeypatch.setattr(script, "atexit", types.SimpleNamespace(register=print))  # not when pytest ends
        monkeypatch.setitem(script.SCRIPTED, "Counting", lambda obs: np.array([0.25, -0.5]))


# The two files
OWN = {"METHOD", "LEAST", "MOST", "Args", "update_critic", "update_policy", "train"}
OWN |= {"posterior_weights", "adaptive_temperature", "poco_loss", "reduce_next_q", "chain_step", "ppo_loss"}
OWN |= {"sample_chain", "chain_log_prob", "group_advantage", "chi2_penalised_q"}
LIMITS = {poco: (850, 44, 370), ogpo: (950, 49, 460)}  # lines, KB, last line of train


def test_what_both_scripts_share_is_identical_to_the_letter():
    """The lines without a docstring and a method's own definitions; all of common arguments."""
    shared, fields = [], []
    for script in SCRIPTS.values():
        source = Path(script.__file__).read_text()
        lines, body = source.splitlines(), ast.parse(source).body
        for node in body:
            targets = [getattr(target, "value", target) for target in getattr(node, "targets", [node])]
            names = {getattr(target, "id", getattr(target, "name", "")) for target in targets}
            if names & OWN or node is body[0]:
                first = min(part.lineno for part in [node, *getattr(node, "decorator_list", ())])
                lines[first - 1 : node.end_lineno] = [None] * (node.end_lineno - first + 1)
        shared.append([line for line in lines if line])
        rows = re.findall(r"\n    (\w+)(: .+? = .+?  # .+)", source.split(" Args:")[1].split("\n\n")[0])
        fields.append(dict(rows))  # type, default and help
        assert list(fields[-1]) == list(vars(script.Args()))
    assert len(shared[0]) > 300 and shared[0] == shared[1]
    common = [[name for name in fields[i] if name in fields[1 - i]] for i in (0, 1)]
    assert common[0] == common[1] and len(common[0]) > 25
    assert all(fields[0][name] == fields[1][name] for name in common[0])


@both_scripts
def test_a_script_can_be_read_in_one_sitting(script):
    lines, kilobytes, end_of_train = LIMITS[script]
    source = Path(script.__file__).read_text()
    assert len(source.splitlines()) <= lines and len(source.encode()) <= kilobytes * 1024
    (train,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "train")
    assert train.end_lineno <= end_of_train and train.end_lineno - train.lineno < 80
    nested = (ast.FunctionDef, ast.Lambda)
    assert not any(isinstance(node, nested) for statement in train.body for node in ast.walk(statement))


def test_no_line_is_above_110_columns():
    files = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("*.md"), *ROOT.glob("*/*.md")]
    lines = [(path.name, line) for path in files for line in path.read_text().splitlines()]
    assert len(files) > 5 and not [line for line in lines if len(line[1]) > 110]
    assert len((ROOT / "test_poco.py").read_text().splitlines()) <= 1100
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


def fit(network, obs, reward=0.0):
    """Gives the network the statistics of a buffer with these observations and this reward in every step."""
    steps, widths = torch.nn.functional.pad(obs, (0, 1), value=reward), [obs.shape[1], 0, 0, 1, 0, 0]
    network.normalize.fit(types.SimpleNamespace(steps=steps, size=len(obs), widths=widths))


# Flow policy
def numpy_velocity(policy, obs, x, t):
    """The network of FlowPolicy, written again in float64."""
    w = {name: value.double().numpy() for name, value in policy.state_dict().items()}
    obs = np.clip((obs - w["normalize.mean"]) / w["normalize.std"], -10, 10)
    h = np.concatenate([obs, x, t], axis=1)
    for layer in (0, 2, 4):
        h = h @ w[f"net.{layer}.weight"].T + w[f"net.{layer}.bias"]
        h = h / (1 + np.exp(-h))  # SiLU
    return h @ w["net.6.weight"].T + w["net.6.bias"]


def test_bc_loss_sample_and_the_normalizer_which_travels_in_the_state_dict():
    rng = np.random.default_rng(0)
    policy = FlowPolicy(obs_dim=3, chunk_dim=6, flow_steps=7)
    fit(policy, torch.tensor(rng.normal(2, 3, (50, 3))).float())
    obs, chunk, noise, time_ = (rng.normal(size=(4, n)) for n in (3, 6, 6, 1))
    valid = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    error = (numpy_velocity(policy, obs, (1 - time_) * noise + time_ * chunk, time_) - (chunk - noise)) ** 2
    masked = [error[i, : 2 * valid[i].sum()].mean() for i in range(4)]  # T = 3 actions of 2 numbers
    given = [torch.tensor(value).float() for value in (obs, chunk, valid, noise, time_)]
    np.testing.assert_allclose(policy.bc_loss(*given).detach(), masked, rtol=1e-5)
    given[2] = None
    np.testing.assert_allclose(policy.bc_loss(*given).detach(), error.mean(1), rtol=1e-5)
    for given_steps, steps in ((None, 7), (3, 3)):
        sampled, x = policy.sample(given[0], given[3], given_steps), noise
        for k in range(steps):
            x = x + numpy_velocity(policy, obs, x, np.full((4, 1), k / steps)) / steps
        np.testing.assert_allclose(sampled.detach(), np.clip(x, -1, 1), rtol=1e-4, atol=1e-6)
    assert policy.sample(torch.zeros(1000, 3)).abs().max() <= 1

    policy, other = FlowPolicy(obs_dim=3, chunk_dim=2), FlowPolicy(obs_dim=3, chunk_dim=2)
    obs = torch.stack([torch.full((100,), 7.0), torch.full((100,), 1e-9), torch.randn(100) * 5 + 1], dim=1)
    fit(policy, obs, reward=-4.0)
    assert policy.normalize.reward_scale == 0.25
    normal = policy.normalize(obs)  # of two constant features and one that is not
    assert normal.abs().max() < 5 and policy.normalize(obs + 1).abs().max() <= 10
    np.testing.assert_allclose(normal[:, 2].mean(), 0, atol=1e-5)
    np.testing.assert_allclose(normal[:, 2].std(correction=0), 1, rtol=1e-5)
    other.load_state_dict(policy.state_dict())
    assert torch.equal(other.normalize(obs), normal)


# Critic
def test_critics_are_independent_networks_with_layer_norm_and_their_loss_leaves_padding_out():
    rng = np.random.default_rng(0)
    critic = CriticEnsemble(obs_dim=3, chunk_dim=2, num_critics=4, hidden_dim=16)
    fit(critic, torch.tensor(rng.normal(1, 2, (50, 3))).float())
    obs, chunk, expected = rng.normal(size=(5, 3)), rng.normal(size=(5, 2)), []
    w = {name: value.double().numpy() for name, value in critic.state_dict().items()}
    for m in range(4):
        h = np.concatenate([(obs - w["normalize.mean"]) / w["normalize.std"], chunk], axis=1)
        for layer in (0, 3, 6):
            h = h @ w[f"net.{layer}.weight"][m] + w[f"net.{layer}.bias"][m]
            h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
            h = h / (1 + np.exp(-h))
        expected.append((h @ w["head.weight"][m] + w["head.bias"][m])[:, 0])
    q = critic(torch.tensor(obs).float(), torch.tensor(chunk).float())
    np.testing.assert_allclose(q.detach(), expected, rtol=1e-4, atol=1e-5)
    assert q.std(0).min() > 1e-3  # members start apart
    q, target = torch.tensor([[1.0, 50.0], [3.0, 50.0]], requires_grad=True), torch.tensor([2.0, 0.0])
    loss = poco.critic_loss(q, target, torch.tensor([1.0, 0.0]))
    loss.backward()
    assert loss.item() == 1 and q.grad.tolist() == [[-1, 0], [1, 0]]
    assert poco.critic_loss(q, target, torch.zeros(2)) == 0  # none: no NaN


@pytest.mark.parametrize(("terminated", "n", "chunk_size"), [(True, 7, 5), (True, 4, 2), (False, 10, 2)])
def test_critic_converges_to_the_values_of_a_small_mdp(terminated, n, chunk_size):
    """A row of states whose last step is worth 1, with an end; or a ring of four, with a time limit."""
    gamma, length = 0.9, n if terminated else 4
    buffer = ReplayBuffer(100, 8, 1, chunk_size, gamma)
    rewards, state = 1.0 * (np.arange(n) % length == length - 1), np.arange(n + 1) % (length + terminated)
    buffer.add_episode(Trajectory(np.eye(8)[state], np.ones((n, 1)), rewards, terminated, 1.0))
    args = Args(chunk_size=chunk_size, gamma=gamma, tau=0.05)
    policy = types.SimpleNamespace(sample=lambda obs: torch.ones(len(obs), chunk_size))
    critic, target = (CriticEnsemble(8, chunk_size, 2, hidden_dim=32) for _ in range(2))
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3, fused=True)
    for _ in range(1500):
        poco.update_critic(policy, critic, target, optimizer, buffer.sample(32), args)
    values = [gamma ** (length - 1 - i) / (1 if terminated else 1 - gamma**4) for i in range(length)]
    q = critic(torch.eye(8)[:length], torch.ones(length, chunk_size))
    np.testing.assert_allclose(q.detach(), [values, values], rtol=0.05)


# The algorithm
def test_posterior_weights_and_poco_loss_which_gives_a_clipped_candidate_no_gradient():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(6, 5))
    for eta in (0.1, 1.0, 30.0):
        expected = np.exp(q / eta) / np.exp(q / eta).sum(1, keepdims=True)
        np.testing.assert_allclose(poco.posterior_weights(torch.tensor(q), eta), expected, rtol=1e-10)
    greedy = torch.nn.functional.one_hot(torch.tensor(q).argmax(1), 5).double()
    assert torch.equal(poco.posterior_weights(torch.tensor(q), 1e-6), greedy)
    for extreme in ([[1e6, -1e6, 1e6]], [[-1e6, -1e6, -1e6]]):
        weights = poco.posterior_weights(torch.tensor(extreme), 1e-3)
        assert torch.isfinite(weights).all() and weights.sum().item() == pytest.approx(1)
    for scale, share in ((1.0, 0.3), (-50.0, 0.1), (1e-3, 0.7)):  # free of the scale of Q, state by state
        values = scale * rng.normal(size=(4, 20_000)) * [[1], [3], [0.1], [7]]
        eta = poco.adaptive_temperature(torch.tensor(values), share)
        np.testing.assert_allclose(eta[:, 0], values.std(1) / np.sqrt(np.log(1 / share)), rtol=1e-4)
        samples = 1 / poco.posterior_weights(torch.tensor(values), eta).square().sum(1)
        np.testing.assert_allclose(samples / 20_000, share, rtol=0.25)
    equal = torch.full((1, 5), 3.0)
    assert (poco.posterior_weights(equal, poco.adaptive_temperature(equal, 0.3)) == 0.2).all()
    losses, bc, weights = rng.exponential(size=(7, 4)), rng.exponential(size=9), rng.dirichlet(np.ones(4), 7)
    for beta, zeta in ((1.0, 0.4), (0.3, 1.0), (0.0, 0.5)):  # equation 23
        posterior = sum(weights[s, j] * min(losses[s, j], zeta) for s in range(7) for j in range(4)) / 7
        loss = poco.poco_loss(*map(torch.tensor, (losses, weights, bc)), beta, zeta)
        assert loss.item() == pytest.approx(beta * posterior + bc.mean(), rel=1e-12)
    policy = FlowPolicy(obs_dim=2, chunk_dim=2)
    obs, chunk = torch.randn(2, 2), torch.tensor([[0.1, 0.1], [1.0, -1.0]])
    noise, moment = torch.tensor([[0.0, 0.0], [3.0, 3.0]]), torch.full((2, 1), 0.5)
    for row in (0, 1):
        losses = policy.bc_loss(obs, chunk, None, noise, moment)
        assert losses[0] < 1 < losses[1]
        loss = poco.poco_loss(losses.view(1, 2), torch.eye(2)[[row]], torch.zeros(1), 1.0, 1.0)
        gradient = sum(part.abs().sum() for part in torch.autograd.grad(loss, list(policy.parameters())))
        assert (gradient > 1e-3) if row == 0 else (gradient == 0)


def bandit_values(obs, chunk):
    """Only +0.5 is worth something. Stands for two critics, (M, B)."""
    return (chunk.T > 0).float() * torch.tensor([[1.0], [2.0]])


@functools.cache
def bandit_clone():
    """A policy with 80 % of its mass at -0.5 and 20 % at +0.5."""
    policy = FlowPolicy(obs_dim=1, chunk_dim=1, hidden_dim=32, flow_steps=5)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3, fused=True)
    for _ in range(600):
        chunk = torch.where(torch.rand(128, 1) < 0.2, 0.5, -0.5) + 0.05 * torch.randn(128, 1)
        poco.gradient_step(optimizer, policy.bc_loss(torch.zeros(128, 1), chunk, None).mean())
    return policy


def poco_bandit(policy, temperature):
    """Returns: the better mode's share after POCO, and metrics."""
    args = Args(num_candidates=8, posterior_batch_size=64, posterior_coef=3.0, temperature=temperature)
    args.clip_threshold, policy = temperature and 5.0, copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=2e-3, fused=True)
    for _ in range(400):
        chunk = torch.where(torch.rand(128, 1) < 0.2, 0.5, -0.5) + 0.05 * torch.randn(128, 1)
        batch = Batch(torch.zeros(128, 1), chunk, None, None, None, torch.ones(128, 1))
        metrics = poco.update_policy(policy, bandit_values, optimizer, batch, args)
    return (policy.sample(torch.zeros(4000, 1)) > 0).float().mean(), metrics


def test_a_clone_samples_both_modes_in_proportion_and_poco_moves_the_mass_to_the_better_one():
    assert (bandit_clone().sample(torch.zeros(4000, 1)) > 0).float().mean() == pytest.approx(0.2, abs=0.05)
    for temperature in (0.05, None):  # None adapts
        share, metrics = poco_bandit(bandit_clone(), temperature)
        assert share > 0.45  # a fixed point between the buffer's 0.2 and the posterior's nearly 1
        assert 0 < metrics["losses/clip_fraction"] < 0.2 and 1 <= metrics["losses/effective_samples"] <= 8
    assert poco_bandit(bandit_clone(), temperature=1e6)[0] < 0.35  # uniform weights teach nothing


# OGPO
class MixtureFlow:
    """The exact flow from N(0, I) to a mixture of Gaussians N(means_c, std^2 I), in float64."""
    def __init__(self, means, std, shares, flow_steps=50):
        self.means, self.std, self.shares = torch.tensor(means).double(), std, torch.tensor(shares).double()
        self.chunk_dim, self.flow_steps = self.means.shape[1], flow_steps

    def velocity(self, obs, x, t):
        var = (1 - t) ** 2 + (t * self.std) ** 2  # of every component of x_t
        rel = x[:, None] - t[:, None] * self.means  # (B, C, D)
        share = torch.softmax(self.shares.log() - rel.square().sum(2) / (2 * var), dim=1)
        v = self.means + ((t * self.std**2 - (1 - t)) / var)[:, None] * rel  # E[x_1 - x_0 | x_t, component]
        return (share[..., None] * v).sum(1)


GAUSSIAN = MixtureFlow([[0.4, -0.3]], 0.3, [1.0])
TWO_MODES = MixtureFlow([[0.6, 0.6], [-0.4, -0.4]], 0.1, [0.3, 0.7])


def own_chain(policy, obs, sigma, noise, without):
    """The stochastic sampler, without one of its two parts. Returns: (2, B, D), first and last."""
    x, dt = noise, 1 / policy.flow_steps
    for k in range(policy.flow_steps):
        t = torch.full_like(x[:, :1], k * dt)
        v = policy.velocity(obs, x, t)
        drift = v if without == "score" else v + sigma**2 / 2 * (t * v - x)
        scale = 1.0 if without == "sqrt dt" else dt**0.5
        x = x + drift * dt + sigma * torch.sqrt(1 - t) * scale * torch.randn_like(x)
    return torch.stack([noise, x])


def assert_marginals(sampler, flow, sigma, n=4000):
    """Mean, covariance and mode shares lie within 4.5 standard errors of the ODE's: those with sigma 0."""
    obs, noise = torch.zeros(n, 1), torch.randn(2, n, flow.chunk_dim).double()
    x = torch.stack([sampler(flow, obs, s, start)[-1] for s, start in zip((sigma, 0.0), noise, strict=True)])
    features = torch.cat([x, x**2, x.prod(2, keepdim=True), (x[..., :1] > 0.1).double()], dim=2)  # (2, n, 6)
    difference, variance = features.mean(1).diff(dim=0).abs(), features.var(1).sum(0)
    assert (difference < 4.5 * torch.sqrt(variance / n)).all()
    for mode in (x[0, :, 0] > 0.1, x[0, :, 0] <= 0.1) if flow is TWO_MODES else ():
        assert x[0, mode].std(0).max() < 0.1 * 1.08 and x[0, mode].std(0).min() > 0.1 * 0.88


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("flow", [GAUSSIAN, TWO_MODES], ids=["gaussian", "two modes"])
def test_the_stochastic_sampler_keeps_the_marginals_of_the_ode(flow, sigma):
    assert_marginals(lambda *args: ogpo.sample_chain(*args)[0], flow, sigma)
    assert_marginals(functools.partial(own_chain, without=""), flow, sigma)
    for without, least in (("score", 0.5), ("sqrt dt", 0.1)):  # below, it is within the Monte-Carlo error
        if sigma >= least:
            with pytest.raises(AssertionError):
                assert_marginals(functools.partial(own_chain, without=without), flow, sigma)


def test_chain_log_prob():
    rng = np.random.default_rng(0)
    policy = FlowPolicy(obs_dim=3, chunk_dim=4, flow_steps=6)
    fit(policy, torch.tensor(rng.normal(2, 3, (50, 3))).float())
    obs = rng.normal(size=(5, 3))
    given = torch.tensor(obs).float()
    for sigma in (0.1, 1.0):
        chain, own_log_prob = ogpo.sample_chain(policy, given, sigma)
        other = chain + 0.01 * torch.randn_like(chain)
        log_probs = [ogpo.chain_log_prob(policy, given, points, sigma).detach() for points in (chain, other)]
        for log_prob, points in zip([own_log_prob, *log_probs], (chain, chain, other), strict=True):
            x, dt, expected = points.double().numpy(), 1 / 6, 0
            for k in range(6):  # log N(x_{k+1}; mean, std^2) of every step and dimension, averaged
                v = numpy_velocity(policy, obs, x[k], np.full((5, 1), k * dt))
                sigma_t, score = sigma * np.sqrt(1 - k * dt), (k * dt * v - x[k]) / (1 - k * dt)
                mean, std = x[k] + dt * (v + sigma_t**2 / 2 * score), sigma_t * np.sqrt(dt)
                expected += -(((x[k + 1] - mean) / std) ** 2) / 2 - np.log(std) - np.log(2 * np.pi) / 2
            np.testing.assert_allclose(log_prob, expected.mean(1) / 6, rtol=1e-4, atol=1e-4)


def test_advantages_penalised_values_and_ppo_loss_with_its_gradient():
    rng = np.random.default_rng(0)
    q, ratio = rng.normal(size=(3, 6, 4)), rng.exponential(size=(6, 4))
    given = torch.tensor(q)
    advantage, conservative = q - q.mean(2, keepdims=True), np.zeros((6, 4))
    np.testing.assert_allclose(ogpo.group_advantage(given, False), advantage.mean(0), rtol=1e-10)
    for s, j in np.ndindex(6, 4):
        members = advantage[:, s, j]
        if (members > 0).all() or (members < 0).all():
            conservative[s, j] = members[np.abs(members).argmin()]
    np.testing.assert_allclose(ogpo.group_advantage(given, True), conservative, rtol=1e-10)
    assert 0 < (conservative == 0).mean() < 1
    for how, reduce in (("mean", np.mean), ("min", np.min)):
        np.testing.assert_allclose(poco.aggregate(given, how), reduce(q, axis=0))
    for how, reduce in (("mean", np.mean), ("median", np.median)):
        np.testing.assert_allclose(ogpo.reduce_next_q(given[0], how), reduce(q[0], axis=1))
    w = 1 / (1 + np.exp(-5 * (ratio - 1)))
    expected = (1 - w) * q.mean(0) + w * q.min(0) - 0.1 * q.std(0) * ratio
    penalised = ogpo.chi2_penalised_q(given, torch.tensor(ratio), 0.1, 5.0)
    np.testing.assert_allclose(penalised, expected, rtol=1e-10)
    for r, expected in ((4.0, q.min(0)), (0.01, q.mean(0))):  # far from the slow policy, and near it
        penalised = ogpo.chi2_penalised_q(given, torch.full((6, 4), r).double(), 0.0, 20.0)
        np.testing.assert_allclose(penalised, expected, atol=1e-6)
    log_prob, old_log_prob, advantage = rng.normal(size=(3, 200)) * [[0.05], [0.05], [1.0]]
    ratio = np.exp(log_prob - old_log_prob)
    pairs = zip(ratio, advantage, strict=True)
    expected = -np.mean([min(r * a, np.clip(r, 0.97, 1.03) * a) for r, a in pairs])
    loss, metrics = ogpo.ppo_loss(*map(torch.tensor, (log_prob, old_log_prob, advantage)), 0.03)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    assert metrics["losses/clip_fraction"].item() == pytest.approx((np.abs(ratio - 1) > 0.03).mean())
    log_prob = torch.tensor([0.1, 0.1, -0.1, -0.1], requires_grad=True)
    ogpo.ppo_loss(log_prob, torch.zeros(4), torch.tensor([1.0, -1.0, 1.0, -1.0]), 0.05)[0].backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([0, 1, -1, 0]) * log_prob.detach().exp() / 4)


def ogpo_bandit(steps=200, success_chunk=0.0, **settings):
    """Returns: the better mode's share after OGPO, metrics, and the three policies' parameters."""
    fixed = {"group_size": 8, "ppo_batch_size": 32, "sigma": 1.0, "clip_epsilon": 0.02, "policy_tau": 0.1}
    fixed |= {"num_critics": 2, "success_coef": 0.0, "conservative": False}
    args, policies = ogpo.Args(**(fixed | settings)), [copy.deepcopy(bandit_clone()) for _ in range(3)]
    optimizer = torch.optim.Adam(policies[0].parameters(), lr=1e-3, fused=True)
    batch = Batch(torch.zeros(128, 1), torch.zeros(128, 1), None, None, None, torch.ones(128, 1))
    success = batch._replace(chunk=torch.full((128, 1), success_chunk))
    for _ in range(steps):
        metrics = ogpo.update_policy(*policies, bandit_values, optimizer, batch, success, args)
    parameters = [torch.nn.utils.parameters_to_vector(policy.parameters()) for policy in policies]
    return (policies[0].sample(torch.zeros(4000, 1)) > 0).float().mean(), metrics, parameters


def test_ogpo_moves_the_mass_to_the_better_mode_less_the_penalty_and_the_cloning_of_successes():
    for conservative in (False, True):
        share, metrics, (policy, old_policy, slow_policy) = ogpo_bandit(conservative=conservative)
        assert share > 0.9 and metrics["losses/group_q_std"] < 0.4  # 0.6 in the clone
        assert 0 < (old_policy - policy).abs().sum() < (slow_policy - policy).abs().sum()
    assert ogpo_bandit(steps=60, chi2_coef=20.0)[0] < ogpo_bandit(steps=60)[0] - 0.1  # where critics disagree
    assert ogpo_bandit(success_coef=5.0, success_chunk=-0.5)[0] < 0.1  # against the critics


def test_next_chunk_samples_average_the_td_target():
    """The critic says 0, its target the chunk drawn, N(0, 1): the loss is the variance of what n become."""
    zeros, critic, target = torch.zeros(4000), torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    critic.normalize = ogpo.Normalizer(1)
    batch = Batch(zeros[:, None], zeros[:, None], zeros, zeros[:, None], zeros, torch.ones(4000, 1))
    policy = types.SimpleNamespace(sample=lambda obs: torch.randn(len(obs), 1))
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.0, fused=True)
    critic.forward = lambda obs, chunk: 0 * (chunk.T * critic.weight + critic.bias)
    target.forward = lambda obs, chunk: chunk.T
    for n, reduction, variance in ((1, "mean", 1), (8, "mean", 1 / 8), (8, "median", 0.168)):
        args = ogpo.Args(next_samples=n, next_reduction=reduction, chunk_size=1, gamma=1.0)
        metrics = ogpo.update_critic(policy, critic, target, optimizer, batch, args)
        assert metrics["losses/qf_loss"].item() == pytest.approx(variance, rel=0.1)


# Replay windows
@pytest.mark.parametrize("terminated", [True, False])
def test_td_target_and_windows_on_a_hand_made_episode(terminated):
    """Window 0 ends inside the episode, window 1 at its end, windows 2 and 3 are padded."""
    buffer = ReplayBuffer(10, 1, 1, chunk_size=3, gamma=0.9)
    steps = np.arange(5.0)[:, None], np.arange(1.0, 5)[:, None] / 10, np.array([1.0, 2.0, 4.0, 8.0])
    buffer.add_episode(Trajectory(*steps, terminated, 0.0))
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


@pytest.mark.parametrize("capacity", [1000, 37, 5])
def test_buffer_never_mixes_episodes(capacity):
    """A step carries its episode and place: windows must be runs of one episode, of the newest steps."""
    rng = np.random.default_rng(0)
    buffer, written, lengths = ReplayBuffer(capacity, 2, 1, chunk_size=4, gamma=0.9), [], []
    for episode in range(60):
        n = int(rng.integers(1, 12))
        obs = np.stack([np.full(n + 1, episode), np.arange(n + 1)], axis=1)
        actions = (episode * 100 + np.arange(n))[:, None]
        buffer.add_episode(Trajectory(obs, actions, np.ones(n), episode % 2 == 0, 0.0))
        written, lengths, seen = written + [(episode, step) for step in range(n)], [*lengths, n], set()
        for obs, chunk, _, next_obs, terminated, valid in zip(*buffer.sample(300), strict=True):
            e, step = obs.int().tolist()
            k = min(4, lengths[e] - step)
            assert valid.tolist() == [1] * k + [0] * (4 - k)
            assert chunk.tolist()[:k] == [e * 100 + step + i for i in range(k)]
            assert next_obs.tolist() == [e, step + k]
            assert terminated == (e % 2 == 0 and step + k == lengths[e])
            seen.add((e, step))
        assert buffer.size == min(len(written), capacity) and seen <= set(written[-capacity:])
    with pytest.raises(poco.UserError) if buffer.size == capacity else poco.contextlib.nullcontext():
        ReplayBuffer(capacity + 1, 2, 1, chunk_size=4, gamma=0.9).load_state_dict(buffer.state_dict())


# Environments
class Counting(gym.Env):
    """Counts its steps. Episodes of even length terminate, odd ones hit a limit; length 5 is a success."""
    observation_space = gym.spaces.Dict({"count": Box(-np.inf, np.inf, (1,)), "goal": Box(-1, 1, (2,))})
    action_space = Box(np.array([[0.0], [-4.0]]), np.array([[10.0], [4.0]]), (2, 1), np.float64)

    def __init__(self, render_mode=None, fault=None, factor=1.0):
        self.fault, self.factor, self.steps = fault, factor, 0
        if fault == "no bounds":
            self.action_space = Box(-np.inf, np.inf, (1,))
        if fault == "rounding":
            self.action_space = Box(np.float32([[0.1], [5.0]]), np.float32([[123.4], [5.0]]), (2, 1))
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
        }
        info = infos.get(self.fault, {"is_success": float(self.end == 5)})
        return self.obs(), reward, over and even, over and not even, info


FAULTS = ("NaN", "NaN at reset", "raises", "raises in reset", "endless", "no bounds", "rounding", "sequence")
FAULTS += ("only success", "passing")
FAMILIES = ["FetchReach-v4", "AdroitHandDoor-v1", "FrankaKitchen-v1", "HandReach-v3", "PointMaze_UMaze-v3"]
FAMILIES += ["AntMaze_UMaze-v5", "HandManipulateBlock-v1", "Pendulum-v1"]
gym.register("Counting-v0", lambda: Counting())  # without arguments
for factor in (0.01, 100, 1024):
    gym.register(f"Times{factor}-v0", Counting, kwargs={"factor": factor})
for fault in FAULTS:
    gym.register(f"{fault.title().replace(' ', '')}-v0", Counting, kwargs={"fault": fault})


def episodes_of(env_id, action=0.0, n=20, **settings):
    args = Args(env_id=env_id, chunk_size=2, num_envs=3, **settings)
    return poco.collect_episodes(args, lambda obs: np.full((len(obs), 4), action, np.float32), range(n))


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_rollout_has_no_reset_steps_and_starts_a_chunk_with_every_episode(chunk_size):
    args, seen_at_start, episodes, steps = Args(env_id="Counting-v0", chunk_size=chunk_size), [], [], 0

    def act(obs):
        seen_at_start.extend(obs[:, 0])
        return np.tile(np.repeat(np.arange(chunk_size) / 10, 2), (len(obs), 1))  # an action tells its place

    runner = poco.rollout([poco.Environment(args) for _ in range(3)], act, iter(range(10**6)))
    while len(episodes) < 40:
        episodes, steps = episodes + next(runner), steps + 3
    for episode in episodes:
        n = len(episode.actions)
        assert episode.obs[:, 0].tolist() == list(range(n + 1))  # the last is the end's, not the next one's
        np.testing.assert_allclose(episode.actions[:, 0], np.arange(n) % chunk_size / 10, rtol=1e-6)
        np.testing.assert_allclose(episode.rewards, 5 + 5 * episode.actions[:, 0], rtol=1e-6)
        assert episode.terminated == (n % 2 == 0) and episode.success == (n == 5)
        env = gym.make("Counting-v0")
        env.reset(seed=episode.seed)
        assert env.unwrapped.end == n
    assert len({episode.seed for episode in episodes}) == len(episodes)
    assert steps - 3 * 8 <= sum(len(episode.actions) for episode in episodes) <= steps
    assert all(count % chunk_size == 0 for count in seen_at_start)


def test_evaluation_counts_every_seed_once_and_takes_the_candidate_the_critics_prefer(capsys):
    args = Args(env_id="Counting-v0", best_of_n=3, chunk_size=2, num_envs=3, hidden_dim=16, eval_episodes=20)
    policy, critic, _ = poco.make_networks(args)
    n = [len(episode.actions) for episode in episodes_of("Counting-v0")].count(5)
    metrics = poco.evaluate(policy, critic, args, 3, Path("step 5"))
    assert metrics["eval/success"] == metrics["eval/ode_success"] == n / 20
    assert f"step 5, best of 3: success {n / 20:.2f} ({n}/20), mean return" in capsys.readouterr().out
    torch.manual_seed(3)
    candidates = policy.sample(torch.zeros(48, 3)).view(6, 8, 4)
    torch.manual_seed(3)
    chosen = poco.choose_chunks(policy, lambda obs, chunk: chunk.T[:1], 8, np.zeros((6, 3)))
    expected = [group[group[:, 0].argmax()].tolist() for group in candidates]
    np.testing.assert_allclose(chosen, expected, rtol=1e-5)


def test_actions_cover_the_box_and_success_of_every_family():
    for action, reward in ((-1.0, 0.0), (0.0, 5.0), (1.0, 10.0)):
        assert episodes_of("Counting-v0", action, 1)[0].rewards == pytest.approx(reward)
    low, high = (episodes_of("Rounding-v0", action, 1)[0] for action in (-1.0, 1.0))  # contains() would raise
    assert low.rewards[0] == pytest.approx(0.1) and high.rewards[0] == np.float32(123.4)
    poco.Environment.reporting.discard("OnlySuccess-v0")
    for success_at, expected in (("end", 0.0), ("any", 1.0)):
        assert {episode.success for episode in episodes_of("Passing-v0", success_at=success_at)} == {expected}
    for _ in range(2):  # once seen, missing means 0
        episodes = episodes_of("OnlySuccess-v0")
        known = [episode for episode in episodes if not np.isnan(episode.success)]
        assert [episode.success for episode in known] == [len(episode.actions) == 5 for episode in known]
    assert len(known) == len(episodes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", FAMILIES)
def test_environment_families_report_success_or_not(env_id):
    env = poco.Environment(Args(env_id=env_id))
    env.reset(0)
    env.chunk = [np.zeros(env.action_dim, np.float32)]
    assert env.obs.shape == (env.obs_dim,) and env.step() is None
    assert np.isnan(env.success) == (env_id in ("Pendulum-v1", "FrankaKitchen-v1")) and env.success != 1


@pytest.mark.parametrize("task", poco.SCRIPTED)
def test_demonstrators_succeed(task):
    episodes = poco.run_controller(Args(env_id=f"{task}-v4", num_demos=12, demo_noise=0.2))
    assert len(episodes) == 12 and np.mean([episode.success for episode in episodes]) >= 0.8


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
    state = torch.load(folder / "checkpoint.pt", weights_only=True)["run"][0][0]
    return state | {"policy.pt": content["policy"], "critic.pt": content["critic"]}


@both_scripts
def test_a_run_writes_its_files_and_is_the_same_again_at_any_scale(script, tmp_path, monkeypatch, capsys):
    folders = [small_run(script, tmp_path / name, monkeypatch)[1] for name in ("first", "second")]
    rows, folder = rows_of(folders[0]), folders[1]
    assert rows_of(folder) == rows and same(*map(states_of, folders))
    assert [int(row["global_step"]) for row in rows] == [0, 60, 120, 150, 180, 240, 300]
    assert [row["eval/success"] != "" for row in rows] == [step in (0, 3, 6) for step in range(7)]
    assert rows[2]["losses/qf_loss"] and not rows[2]["losses/actor_loss"] and rows[3]["losses/actor_loss"]
    assert states_of(folder)["policy"]["normalize.mean"][0] > 0.5  # statistics of what it met
    assert re.fullmatch(rf"Counting-v0__{script.METHOD}__1__[\d-]+", folder.name)
    assert sorted(path.stem for path in folder.iterdir()) == ["checkpoint", "clone", "metrics", "policy"]
    out, policy = capsys.readouterr().out, folder / "policy.pt"
    for option in (f"--resume runs/{folder.name}", f"--evaluate runs/{folder.name}/policy.pt"):
        assert f"python {script.METHOD}.py {option}\n" in out
    results = re.findall(r"step 300, best of \d: (success .*)", out)
    assert main(script, monkeypatch, "--evaluate", policy) == 0
    assert f": {results[-1]}\n" in capsys.readouterr().out
    assert main(script, monkeypatch, "--evaluate", policy, "--eval-episodes", 3) == 0
    assert "/3)" in capsys.readouterr().out  # what is typed counts
    for factor, tolerance in ((1024, 0), (100, 1e-3), (0.01, 1e-3)):  # rounding, unless a power of two
        _, scaled = small_run(script, tmp_path / str(factor), monkeypatch, env_id=f"Times{factor}-v0")
        for a, b in zip(*(states_of(run)["policy.pt"].values() for run in (folder, scaled)), strict=True):
            assert a.dim() == 0 or (a - b).abs().max() <= tolerance  # less its reward_scale
        returns = [float(run[-1]["charts/episodic_return"]) for run in (rows, rows_of(scaled))]
        assert returns[1] == pytest.approx(factor * returns[0], rel=1e-4)


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


@pytest.mark.parametrize(("script", "every"), [(poco, 1), (ogpo, 3)], ids=SCRIPTS)
def test_a_run_killed_in_any_write_and_resumed_ends_as_undisturbed(script, every, tmp_path, monkeypatch):
    honest, written, last = script.write_file, [], 10**9

    def write_file(path, data):
        written.append(path.name)
        if len(written) > last:
            path.with_suffix(".tmp").write_bytes(bytes(data)[: len(data) // 2])
            raise Killed
        honest(path, data)

    monkeypatch.setattr(script, "write_file", write_file)
    settings = {"dataset": "scripted", "num_demos": 5, "bc_steps": 5, "hidden_dim": 8, "batch_size": 16}
    settings |= {"total_timesteps": 180, "eval_interval": 90, "critic_warmup": 30, "eval_episodes": 2}
    _, whole = small_run(script, tmp_path / "whole", monkeypatch, **settings)
    assert len(written) > 10
    for kill in range(1, len(written), every):
        written, last = [], kill
        with pytest.raises(Killed):
            small_run(script, tmp_path / str(kill), monkeypatch, **settings)
        (folder,), last = (tmp_path / str(kill) / "runs").iterdir(), 10**9
        assert main(script, monkeypatch, "--resume", folder) == 0
        assert rows_of(folder) == rows_of(whole) and same(states_of(folder), states_of(whole))


def test_what_is_typed_beside_resume_counts_and_a_lost_checkpoint_is_refused(tmp_path, monkeypatch, capsys):
    _, folder = small_run(poco, tmp_path, monkeypatch)
    rows, resume, typed = rows_of(folder), ("--resume", folder), {"gamma": 0.5, "learning_rate": 0.01}
    assert main(poco, monkeypatch, *resume, "--hidden-dim", 32) == 2
    assert "does not fit these arguments" in capsys.readouterr().err and rows_of(folder) == rows
    assert main(poco, monkeypatch, *resume, **typed, total_timesteps=360) == 0
    assert rows_of(folder)[: len(rows)] == rows and rows_of(folder)[-1]["global_step"] == "360"
    args, _ = poco.read_file(folder / "checkpoint.pt")
    assert vars(args).items() >= (typed | {"batch_size": 32}).items()
    assert states_of(folder)["critic_optimizer"]["param_groups"][0]["lr"] == 0.01
    for script, ranks in ((poco, 2), (ogpo, 1)):
        monkeypatch.setattr(script, "NUM_RANKS", ranks)
        with pytest.raises(script.UserError, match=f"goes on by python poco.* {folder}"):
            script.Run(poco.replace(args, resume=folder), {})
    monkeypatch.setattr(poco, "NUM_RANKS", 1)
    (folder / "checkpoint.pt").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(poco, monkeypatch, *resume) == 2 and "checkpoint.pt" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


@both_scripts
def test_half_of_a_batch_are_demonstrations_and_none_in_ogpo(script, tmp_path, monkeypatch):
    def record(policy, critic, target_critic, optimizer, batch, args):
        shares.append((batch.obs[:, 1] == 0.5).float().mean().item())  # online it is 0
        return {}

    shares, demo = [], Trajectory(np.full((5, 3), 0.5), np.zeros((4, 2)), np.zeros(4), True, 1.0)
    monkeypatch.setattr(script, "load_demonstrations", lambda args: [demo] * 10)
    monkeypatch.setattr(script, "update_critic", record)
    small_run(script, tmp_path, monkeypatch, dataset="scripted", total_timesteps=900, bc_steps=1)
    assert set(shares[:60]) == {1.0}  # offline
    assert set(shares[-100:]) == {0.0} if script is ogpo else 0.5 < np.mean(shares[-100:]) < 0.6


@both_scripts
def test_a_run_begins_with_the_other_scripts_policy(script, tmp_path, monkeypatch, capsys):
    settings = {"dataset": "scripted", "num_demos": 30, "bc_steps": 10, "total_timesteps": 60}
    _, folder = small_run(poco if script is ogpo else ogpo, tmp_path / "clone", monkeypatch, **settings)
    clone, typed = folder / "clone.pt", {"critic_warmup": 0, "utd_ratio": 0, "best_of_n": 2}
    monkeypatch.chdir(tmp_path)
    assert main(script, monkeypatch, "--policy", clone, "--hidden-dim", 8) == 2  # and writes nothing
    assert "does not fit" in capsys.readouterr().err
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

    monkeypatch.setattr(owner, where, poisoned)
    monkeypatch.setattr(script.Run, "evaluate_and_save", script.Run.save_checkpoint)  # without a check
    settings = {"dataset": "scripted", "num_demos": 10, "bc_steps": 30, "total_timesteps": 150}
    status, folder = small_run(script, tmp_path, monkeypatch, **settings)
    assert status == 2 and re.search(r"losses/\w+ became NaN", capsys.readouterr().err)
    for name, part in torch.load(folder / "checkpoint.pt", weights_only=True)["run"][0][0].items():
        assert "buffer" in name or "optimizer" in name or all(torch.isfinite(x).all() for x in part.values())


FAULTY = {
    "Nan-v0": "an observation, action or reward is NaN", "NanAtReset-v0": "an observation is NaN",
    "Raises-v0": "Raises-v0 failed in step: the robot does not answer",
    "RaisesInReset-v0": "failed in reset: the robot", "Endless-v0": "ends no episode in",
    "NoBounds-v0": "must be a bounded Box", "Sequence-v0": "cannot be used: ", "CartPole-v1": "Discrete",
    "Countin-v0": "Did you mean", "no_such:Own-v0": "no_such",
}  # fmt: skip


# The command line, as a user types it
def start(*command, cwd, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, *map(str, command)]
    return subprocess.Popen(command, cwd=cwd, env=environment, **pipes, **options)


def test_reach_improves_on_its_clone_and_evaluates_to_the_same(tmp_path):
    typed = "--env-id FetchReach-v4 --num-demos 10 --bc-steps 150 --total-timesteps 1500 --eval-interval 1500"
    typed += " --critic-warmup 200 --eval-episodes 30 --hidden-dim 128"
    process = start(poco.__file__, *typed.split(), cwd=tmp_path)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    results = re.findall(r"success ([\d.]+) \((\d+)/30\)", out)
    assert len(results) == 2 and int(results[1][1]) >= int(results[0][1]) + 4
    (command,) = set(re.findall(r"python poco.py (--evaluate .*)", out))
    process = start(poco.__file__, *command.split(), cwd=tmp_path)
    again, err = process.communicate(timeout=240)
    assert process.returncode == 0 and f"success {results[1][0]} ({results[1][1]}/30)" in again, err


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


BAD_INPUT = {
    "--env-id FetchReach-v4 --chunk-size 51": "50 steps", "--dataset none --save-dataset d.npz": "--dataset",
    "--env-id FetchPickAndPlac-v4": "Did you mean", "--effective-samples 1": "--effective-samples",
    "--env-id Pendulum-v1": "a Minari id or none", "ogpo --posterior-coef 1": "posterior-coef",
    f"--buffer-size {10**22}": "--buffer-size", "--dataset some/data-v0": "cannot be used",
    "ogpo --success-coef -1": "--success-coef", "--hidden-dim 1000000": "--hidden-dim",
    "--dataset nowhere.npz": "nowhere.npz", "--evaluate nowhere.pt": "nowhere.pt", "--no-such 1": "no-such",
    "--num-candidates 1": "between 2 and", "ogpo --group-size 1": "--group-size", "ogpo --sigma 0": "--sigma",
    "ogpo --next-reduction max": "median", "--temperature nan": "--temperature", "--eval-interval 199": "200",
    "--gamma 1.5": "between 1e-09 and 1", "--policy nowhere.pt": "nowhere.pt", "--num-demos 0": "--num-demos",
    "--buffer-size 100": "--batch-size", "--temperature 0": "--temperature", "--batch-size 0": "--batch-size",
    "--num-envs -1": "--num-envs", "--resume nowhere": "nowhere",
}  # fmt: skip


@pytest.mark.parametrize("case", [*FAULTY, *BAD_INPUT])
def test_bad_input_and_faulty_environments_get_a_sentence_and_status_2(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script, typed = ogpo if case.startswith("ogpo") else poco, case.removeprefix("ogpo ").split()
    if case in FAULTY:
        typed = as_typed(**(RUN | {"env_id": case, "total_timesteps": 900}))
    assert main(script, monkeypatch, *typed) == 2
    err = capsys.readouterr().err
    assert (FAULTY | BAD_INPUT)[case] in err and "Traceback" not in err
    assert re.search(r"(^|[\n\r])poco\.py: ", err) if case in FAULTY else list(tmp_path.iterdir()) == []


def test_optional_packages_are_named_and_not_needed_to_load(tmp_path, monkeypatch, capsys):
    _, folder = small_run(poco, tmp_path, monkeypatch)
    content = torch.load(folder / "policy.pt", weights_only=True)
    content["args"] |= {"tensorboard": True, "track": True, "capture_video": True}
    torch.save(content, folder / "policy.pt")
    monkeypatch.setattr(poco.importlib.util, "find_spec", lambda name: None)
    assert main(poco, monkeypatch, "--evaluate", folder / "policy.pt") == 0
    needs = {"--tensorboard": "tensorboard", "--track": "wandb", "--capture-video": "moviepy"}
    for typed, package in (needs | {"--dataset some/data-v0": '"minari[hdf5]"'}).items():
        assert main(poco, monkeypatch, *typed.split()) == 2
        assert f"pip install {package}" in capsys.readouterr().err


def test_a_full_disk_ends_with_a_sentence_and_the_last_checkpoint(tmp_path):
    typed = "--env-id Pendulum-v1 --dataset none --hidden-dim 16 --total-timesteps 3000 --utd-ratio 0.01"
    typed += " --eval-interval 1000 --eval-episodes 1"
    limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (135_000, 135_000))  # they grow
    process = start(poco.__file__, *typed.split(), cwd=tmp_path, preexec_fn=limit)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 2 and "too large" in err and "Traceback" not in err
    (folder,) = (tmp_path / "runs").iterdir()
    assert "--resume runs/" in out and 0 < poco.read_file(folder / "checkpoint.pt")[1]["run"][1] < 3000


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("code_was_run",))


def test_damaged_and_malicious_files(tmp_path, monkeypatch):
    _, folder = small_run(poco, tmp_path, monkeypatch)
    whole, content = (folder / "policy.pt").read_bytes(), torch.load(folder / "policy.pt", weights_only=True)
    damaged = {"cut.npz": whole[: len(whole) // 2], "empty.npz": b"", "text.npz": b"hello"}
    damaged |= {"pickle.npz": pickle.dumps(Malicious())}
    for name, data in damaged.items():
        Path(name).write_bytes(data)
        with pytest.raises(poco.UserError, match=name):
            poco.load_demonstrations(Args(env_id="Counting-v0", dataset=name))
    changed = {"torch_pickle": content | {"policy": Malicious()}, "not_a_dict": [1, 2]}
    changed["another env_id"] = content | {"args": content["args"] | {"env_id": "FetchPush-v4"}}
    for name, data in changed.items():
        torch.save(data, name)
    for name in (*damaged, *changed):
        with pytest.raises(poco.UserError, match=name):
            poco.load_policy(Path(name))
    assert not Path("code_was_run").exists()
    refused, rng = 0, np.random.default_rng(0)
    for _ in range(100):
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= rng.integers(1, 256)
        Path("flipped").write_bytes(flipped)
        try:
            loaded = poco.read_file(Path("flipped"))[1]
        except poco.UserError:
            refused += 1
        else:  # the flip fell into a gap between the records
            assert all(same(loaded[name], content[name]) for name in ("policy", "critic"))
    assert refused > 80


# Several processes
def gradients_of(script, rows):
    """Statistics, gradient norm and gradients of one step on these rows of a batch of 64."""
    torch.manual_seed(0)
    obs, chunk, noise = (torch.randn(64, d)[rows] for d in (3, 4, 4))
    time_ = torch.rand(64, 1)[rows]
    policy = script.FlowPolicy(3, 4)
    fit(policy, obs)
    optimizer = torch.optim.Adam(policy.parameters(), fused=True)
    norm = script.gradient_step(optimizer, policy.bc_loss(obs, chunk, None, noise, time_).mean())
    return [policy.normalize.std, norm, *(parameter.grad for parameter in policy.parameters())]


def rank():
    """What each of two processes does: a whole run, then half of the batch's gradient."""
    script, networks = SCRIPTS[sys.argv.pop(1)], {}
    script.Run.record = lambda self, values: networks.update(self.learner)
    script.main()
    names = [name for name in networks if name == "critic" or name.endswith("policy")]
    states = {name: networks[name].state_dict() for name in names}
    gradients = gradients_of(script, slice(script.RANK * 32, script.RANK * 32 + 32))
    torch.save([states, gradients], f"rank{script.RANK}.pt")


def test_two_ranks_stay_equal_and_their_gradient_is_that_of_both_batches(tmp_path, monkeypatch, capsys):
    (tmp_path / "rank.py").write_text("import test_poco\ntest_poco.rank()")
    command = "-m torch.distributed.run --standalone --nproc-per-node=2 rank.py ogpo".split()
    process = start(*command, *as_typed(**(RUN | {"env_id": "test_poco:Counting-v0"})), cwd=tmp_path)
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
        policy, critic = FlowPolicy(3, 4), CriticEnsemble(3, 4, 2)
        drawn = [torch.randn(shape) for shape in ((64, 3), (64, 4), (64,), (64, 3))]
        batch = Batch(*drawn, torch.zeros(64), torch.ones(64, 2))
        adam = [torch.optim.Adam(network.parameters(), fused=True) for network in (policy, critic)]
        losses[hardware] = poco.update_critic(policy, critic, copy.deepcopy(critic), adam[1], batch, args)
        losses[hardware] |= poco.update_policy(policy, critic, adam[0], batch, args)
        assert all(weight.dtype == weight.grad.dtype == torch.float32 for weight in policy.parameters())
    assert any(losses[True][name] != losses[False][name] for name in losses[True])
    for name in ("losses/qf_loss", "losses/actor_loss", "losses/actor_grad_norm", "losses/effective_samples"):
        assert losses[True][name].item() == pytest.approx(losses[False][name].item(), rel=0.03)


def test_blocks_of_rows_change_nothing():
    policy, critic = FlowPolicy(3, 4, hidden_dim=16), CriticEnsemble(3, 4, 2, hidden_dim=16)
    obs, x, t = torch.randn(5000, 3), torch.randn(5000, 4), torch.rand(5000, 1)  # more than two blocks
    values = policy.velocity(obs, x, t), critic(obs, x)
    hidden = critic.net(torch.cat([obs, x], dim=1).expand(2, -1, -1))  # as no statistics were fitted
    whole = policy.net(torch.cat([obs, x, t], dim=1)), critic.head(hidden).squeeze(2)
    for value, expected in zip(values, whole, strict=True):
        torch.testing.assert_close(value, expected)


def test_compiled_updates_are_the_same(tmp_path, monkeypatch):
    traced = functools.partial(torch.compile, backend="eager")  # traced, but no compiler is needed
    monkeypatch.setattr(torch, "compile", lambda f, mode, disable: traced(f, disable=disable))
    _, eager = small_run(ogpo, tmp_path / "eager", monkeypatch, hidden_dim=8)
    _, compiled = small_run(ogpo, tmp_path / "compiled", monkeypatch, hidden_dim=8, compile=True)
    a, b = rows_of(eager)[-1], rows_of(compiled)[-1]
    assert all(a[name] == b[name] or float(b[name]) == pytest.approx(float(a[name]), rel=1e-3) for name in a)


# Another policy
class ResidualGaussian(torch.nn.Module):
    """Not a flow at all: POCO asks of a policy only bc_loss, one loss for each sample, and sample."""
    asked = set()
    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.full((1, 1), -0.3))  # of the bandit's chunks

    def bc_loss(self, obs, chunk, valid):
        return ((chunk - self.mean) ** 2).mean(1)

    def sample(self, obs, flow_steps=5):
        self.asked.add(flow_steps)
        return (self.mean + 0.5 * torch.randn(len(obs), 1)).clamp(-1, 1)


def test_poco_trains_another_policy():
    assert poco_bandit(ResidualGaussian(), temperature=0.05)[0] > 0.45
    assert ResidualGaussian.asked == {5, 10}  # candidates by twice the steps


# Data
def assert_same_episodes(a, b):
    for x, y in zip(a, b, strict=True):
        for name in ("obs", "actions", "rewards", "terminated", "success"):
            np.testing.assert_allclose(getattr(x, name), getattr(y, name), atol=1e-6)


@pytest.fixture
def recorded(tmp_path):
    """Six episodes of Counting, and the file that --save-dataset writes of them."""
    args = Args(env_id="Counting-v0", chunk_size=2, num_demos=6, save_dataset=tmp_path / "data.npz")
    episodes = poco.load_demonstrations(args)
    with np.load(args.save_dataset) as file:
        return poco.replace(args, dataset=str(args.save_dataset)), episodes, dict(file)


def test_saved_demonstrations_load_as_they_were_and_without_next_observations(recorded, capsys, monkeypatch):
    args, episodes, data = recorded
    assert_same_episodes(poco.read_dataset(args), episodes)
    assert data["actions"][:, 0].min() >= 0 and data["actions"][:, 1].max() <= 4  # in their own range
    del data["next_observations"]
    data["terminals"][-1] = data["timeouts"][-1] = 0  # the last episode is unfinished
    episodes[-1] = episodes[-1]._replace(terminated=False)
    data["success"] = np.arange(len(data["rewards"])) == 0
    np.savez(args.dataset, **data)
    loaded = poco.read_dataset(args)
    for episode, whole in zip(loaded, episodes, strict=True):
        n = len(whole.actions) - (not whole.terminated)  # the row at a cut only shows where the episode ended
        assert len(episode.actions) == n and len(episode.obs) == n + 1
        np.testing.assert_allclose(episode.obs[:n], whole.obs[:n], atol=1e-6)
    for success_at, expected in (("end", [0, 0, 0, 0, 0, 0]), ("any", [1, 0, 0, 0, 0, 0])):
        again = poco.read_dataset(poco.replace(args, success_at=success_at))
        assert [episode.success for episode in again] == expected
    lengths = [len(episode.actions) for episode in loaded]
    longest = poco.read_dataset(poco.replace(args, chunk_size=max(lengths)))
    assert len(longest) == lengths.count(max(lengths))
    assert f"{len(longest)} of 6 episodes last a chunk" in capsys.readouterr().out
    monkeypatch.setattr(poco, "NUM_RANKS", 7)
    with pytest.raises(poco.UserError, match="6 episodes are too few for 7 processes"):
        poco.load_demonstrations(args)


WRONG_DATA = {
    "missing key": (lambda d: d.pop("rewards"), "needed are observations"),
    "unequal lengths": (lambda d: d.update(rewards=d["rewards"][1:]), "observations is .*, not"),
    "NaN": (lambda d: d["observations"].__setitem__((7, 0), np.nan), "observations has NaN"),
    "action width": (lambda d: d.update(actions=d["actions"][:, :1]), "rows of 2 numbers"),
    "actions outside": (lambda d: d["actions"].__setitem__((slice(2), 0), 11.5), "outside .* by up to 1.5"),
    "no end": (lambda d: d.update(terminals=0 * d["terminals"], timeouts=0 * d["timeouts"]), "mark no end"),
    "all too short": (lambda d: d.update(timeouts=1 + 0 * d["timeouts"]), "0 episodes are too few"),
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
        poco.load_demonstrations(poco.replace(args, save_dataset=None))
    assert not Path("code_was_run").exists()


@pytest.mark.filterwarnings("ignore")
def test_minari_dataset(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    collector = minari.DataCollector(gym.make("FrankaKitchen-v1", max_episode_steps=12))
    space, rng, recorded = collector.unwrapped.observation_space, np.random.default_rng(0), []
    for seed in range(3):
        obs, rewards = [gym.spaces.flatten(space, collector.reset(seed=seed)[0])], []
        actions = rng.uniform(-1, 1, (12, *collector.action_space.shape))
        for action in actions:
            o, reward, _, _, _ = collector.step(action)
            obs, rewards = [*obs, gym.spaces.flatten(space, o)], [*rewards, reward]
        recorded.append(Trajectory(np.array(obs), actions, np.array(rewards), False, np.nan))
    about = {"author": "a", "author_email": "a@b.c", "code_permalink": "-", "algorithm_name": "random"}
    collector.create_dataset(dataset_id="test/own-v0", **about)
    args = Args(env_id="FrankaKitchen-v1", dataset="test/own-v0")
    assert_same_episodes(poco.load_demonstrations(args), recorded)
    for wrong in ({"env_id": "FetchReach-v4"}, {"dataset": "nothing/here-v0"}):
        with pytest.raises(poco.UserError, match="cannot be used"):
            poco.load_demonstrations(poco.replace(args, **wrong))


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
