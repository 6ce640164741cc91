"""The peers' equations and command lines: python -m pytest benchmark/test_peers.py"""

import subprocess
import sys
from pathlib import Path

import fql
import numpy as np
import qc
import sac
import torch
from fql import poco


def test_qc_s_next_chunk_is_the_critics_best_of_n(monkeypatch):
    chunks, w, obs, policy = torch.randn(35, 4), torch.randn(2, 4), torch.randn(7, 3), poco.FlowPolicy(3, 4)
    policy.sample, args = lambda obs: chunks, qc.Args(best_of_n=5)
    monkeypatch.setattr(qc, "td_step", lambda best, *given: (best.sample(obs), *given))  # in test_poco.py
    given = [lambda obs, chunk: w @ chunk.T * obs[:, 0], "target_critic", "optimizer", "batch", args]
    chosen, *passed_on = qc.update_critic(policy, *given)
    q = (chunks.double().numpy() @ w.double().numpy().T).mean(1).reshape(7, 5) * obs[:, :1].numpy()
    assert passed_on == given and torch.equal(chosen, chunks[np.arange(7) * 5 + q.argmax(1)])


def test_fql_s_one_step_policy_is_held_to_the_clone_s_flow_and_its_q_maximised():
    clone, policy, obs, noise = poco.FlowPolicy(4, 4), fql.OneStepPolicy(4, 4), *torch.randn(2, 5, 4)
    policy.load_state_dict(clone.state_dict())
    (distances, mu), end = policy.distance(obs, noise), clone.sample(obs, noise)
    np.testing.assert_allclose(distances.detach(), ((mu - end) ** 2).detach().numpy().mean(1), rtol=1e-5)
    values = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    loss, (bc, far, q) = fql.fql_loss(*values, 3.0), values.detach().numpy()
    np.testing.assert_allclose(loss.item(), np.mean(bc + 3 * far - q / np.abs(q).mean()), rtol=1e-12)
    (distances.sum() + loss).backward()  # reaches neither the flow nor the scale of Q
    np.testing.assert_allclose(values.grad[2], np.full(9, -1 / np.abs(q).sum()), rtol=1e-12)
    assert all((p.grad is None) == name.startswith("net.") for name, p in policy.named_parameters())


def test_sac_s_buffer_has_the_demonstrations_and_its_actor_takes_flat_observations():
    model = sac.SAC("MultiInputPolicy", "FetchReach-v4", replay_buffer_class=sac.HerReplayBuffer)
    for demo in (demos := poco.run_controller(poco.Args(env_id="FetchReach-v4", num_demos=2))):
        sac.add_episode(model.replay_buffer, model.observation_space, demo)
    batch = model.replay_buffer.sample(500)
    miss = (batch.next_observations["achieved_goal"] - batch.observations["desired_goal"]).norm(dim=1)
    assert (batch.rewards[:, 0] == -(miss > 0.05).float()).all() and batch.dones.sum() == 0  # a time limit
    obs = {key: part[50:100, 0] for key, part in model.replay_buffer.observations.items()}
    acted = sac.Actor(model).sample(torch.tensor(demos[1].obs[:-1]).float()).detach()
    np.testing.assert_allclose(acted, model.predict(obs, deterministic=True)[0], rtol=1e-5, atol=1e-6)


def test_peers_begin_with_a_clone_and_go_on_as_if_never_stopped(tmp_path):
    def run(words):
        subprocess.run(f"{sys.executable} {Path(__file__).parent}/{words}".split(), cwd=tmp_path, check=True)
        file = max(tmp_path.glob("runs/*/metrics.csv"), key=lambda path: path.stat().st_mtime)
        return file.parent, [line.split(",")[:1] + line.split(",")[2:] for line in file.open()]  # no seconds
    tiny = "--num-demos 5 --bc-steps 9 --batch-size 9 --eval-episodes 2 --eval-interval 200 --torch-threads 1"
    clone, _ = run(f"../poco.py --env-id FetchReach-v4 {tiny} --total-timesteps 4")
    for peer in ("qc.py", "fql.py", "sac.py"):
        start = f"{peer} --policy {clone}/clone.pt --critic-warmup 9 --utd-ratio 0.1 --total-timesteps"
        (_, whole), (folder, _) = run(f"{start} 400"), run(f"{start} 200")
        assert run(f"{peer} --resume {folder} --total-timesteps 400") == (folder, whole)
