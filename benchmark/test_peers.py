"""The peers and Robomimic's files: python -m pytest benchmark/test_peers.py"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import fql
import numpy as np
import pytest
import qc
import sac
import torch
from fql import poco
from gymnasium.spaces import Box

HERE = Path(__file__).resolve().parent


def encoder(obs_dim):
    return poco.Encoder(Box(-np.inf, np.inf, (obs_dim,)))


class LinearCritics(torch.nn.Module):
    """Two critics whose values are known: (w . chunk) times the first number of the features."""
    def __init__(self, w):
        super().__init__()
        self.w = w
        self.encode = torch.nn.Identity()

    def forward(self, features, chunk):
        return self.w @ chunk.T * features[:, 0]


def test_qc_s_next_chunk_is_the_critics_best_of_n(monkeypatch):
    n = 5
    obs = torch.randn(7, 3)
    chunks = torch.randn(7 * n, 4)
    critic = LinearCritics(torch.randn(2, 4))
    policy = poco.FlowPolicy(encoder(3), 4)
    policy.sample = lambda features: chunks

    def next_chunk(policy, *others):  # in the place of the TD step, which test_poco.py has
        return policy.sample(policy.encode(obs)), others

    monkeypatch.setattr(qc, "td_step", next_chunk)
    given = (critic, "target_critic", "optimizer", "batch", qc.Args(best_of_n=n))
    chosen, passed_on = qc.update_critic(policy, *given)
    w = critic.w.double().numpy()
    values = chunks.double().numpy() @ w.T
    q = values.mean(1).reshape(7, n) * obs[:, :1].numpy()
    best = np.arange(7) * n + q.argmax(1)
    assert passed_on == given
    assert torch.equal(chosen, chunks[best])


def test_fql_s_one_step_policy_is_held_to_the_flow_of_a_clone():
    clone = poco.FlowPolicy(encoder(4), 4)
    policy = fql.OneStepPolicy(encoder(4), 4)
    policy.load_state_dict(clone.state_dict())
    features = torch.randn(5, 4)
    torch.manual_seed(1)
    noise = torch.randn(5, 4)
    torch.manual_seed(1)
    end = clone.sample(features)  # from this noise
    torch.manual_seed(1)
    chosen = policy.sample(features)
    distances, mu = policy.distance(features, noise)
    expected = ((mu - end) ** 2).detach().numpy().mean(1)
    np.testing.assert_allclose(distances.detach(), expected, rtol=1e-5)
    assert torch.equal(chosen, mu.clamp(-1, 1))
    distances.sum().backward()
    for name, parameter in policy.named_parameters():  # the flow gets no gradient
        assert (parameter.grad is None) == name.startswith("net.")


def test_fql_s_loss_maximises_q_in_units_of_its_size():
    given = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    loss = fql.fql_loss(*given, alpha=3.0)
    bc_losses, distances, q = given.detach().numpy()
    size = np.abs(q).mean()
    expected = np.mean(bc_losses + 3 * distances - q / size)
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-12)
    loss.backward()  # the size gets no gradient
    np.testing.assert_allclose(given.grad[2], np.full(9, -1 / (9 * size)), rtol=1e-12)


def test_sac_s_buffer_has_the_demonstrations_and_its_actor_takes_flat_observations():
    args = poco.Args(env_id="FetchReach-v4", num_demos=2)
    env = poco.Environment(args, first_seed=0)
    demos = poco.load_demonstrations(args, env)
    model = sac.SAC("MultiInputPolicy", args.env_id, replay_buffer_class=sac.HerReplayBuffer)
    for episode in demos:
        sac.add_episode(model.replay_buffer, model.observation_space, episode)

    batch = model.replay_buffer.sample(500)
    achieved = batch.next_observations["achieved_goal"]
    miss = (achieved - batch.observations["desired_goal"]).norm(dim=1)
    rewards = -(miss > 0.05).float()
    assert torch.equal(batch.rewards[:, 0], rewards)
    assert batch.dones.sum() == 0  # a time limit ends them

    stored = model.replay_buffer.observations.items()
    obs = {name: part[50:100, 0] for name, part in stored}
    expected, _ = model.predict(obs, deterministic=True)
    policy = sac.Actor(model)
    flat_obs = torch.tensor(demos[1].obs[:-1])
    with torch.no_grad():
        chosen = policy.sample(policy.encode(flat_obs))
    np.testing.assert_allclose(chosen, expected, rtol=1e-5, atol=1e-6)


def run(command, cwd):
    """Returns: the folder of the run and its metrics, without the seconds."""
    words = f"{sys.executable} {HERE}/{command}".split()
    subprocess.run(words, cwd=cwd, check=True)
    tables = sorted(cwd.glob("runs/*/metrics.csv"), key=os.path.getmtime)
    with open(tables[-1]) as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row["seconds"]
    return tables[-1].parent, rows


def test_peers_begin_with_a_clone_and_go_on_as_if_never_stopped(tmp_path):
    tiny = "--num-demos 5 --bc-steps 9 --batch-size 9 --eval-episodes 2 --eval-interval 200"
    task = "--env-id FetchReach-v4 --torch-threads 1"
    clone, _ = run(f"../poco.py {task} {tiny} --total-timesteps 4", tmp_path)
    start = f"--policy {clone}/clone.pt --critic-warmup 9 --utd-ratio 0.1 --total-timesteps"
    for peer in ("qc.py", "fql.py", "sac.py"):
        _, whole = run(f"{peer} {start} 400", tmp_path)
        folder, _ = run(f"{peer} {start} 200", tmp_path)
        resumed = run(f"{peer} --resume {folder} --total-timesteps 400", tmp_path)
        assert resumed == (folder, whole)


def test_an_episode_of_robomimic_ends_with_the_step_that_solves_it():
    pytest.importorskip("h5py")
    import robomimic_data

    step = np.arange(6.0)[:, None]
    parts = {"eef": np.hstack([step, step]), "object": 10 * step}
    after = {name: part + 1 for name, part in parts.items()}
    solved = {"rewards": np.array([0, 0, 0, 1, 0, 1]), "actions": step}
    solved |= {"obs": parts, "next_obs": after}
    columns = robomimic_data.read(solved, ["object", "eef"])
    assert columns["observations"].tolist() == [[10, 1, 1], [20, 2, 2], [30, 3, 3]]
    assert columns["next_observations"].tolist() == [[11, 2, 2], [21, 3, 3], [31, 4, 4]]
    assert columns["rewards"].tolist() == [-1, -1, 0]
    assert columns["terminals"].tolist() == [False, False, True]
    assert not columns["timeouts"].any()

    failed = solved | {"rewards": np.zeros(6)}
    columns = robomimic_data.read(failed, ["object", "eef"])
    assert columns["rewards"].tolist() == [-1] * 5
    assert columns["timeouts"].tolist() == [False] * 4 + [True]
    assert not columns["terminals"].any()
