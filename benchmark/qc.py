"""Q-chunking (arXiv 2507.07969) in poco.py's place: the policy goes on cloning, the critics choose.

    python benchmark/qc.py --policy runs/.../clone.pt    takes poco.py's arguments

Acting and the TD target take the best of --best-of-n chunks, 32 as in the paper. The policy is not improved,
it clones poco.py's batches: demonstrations and what was chosen. As in the public code the critics choose the
next chunk and the target critics value it; in acting the target critics choose, as in poco.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import poco
from poco import update_critic as td_step


@dataclass
class Args(poco.Args):
    best_of_n: int = 32  # act with the best of n candidates, and value the next state by it


def update_critic(policy, critic, target_critic, optimizer, batch, args):
    """poco.py's TD step towards sum_i gamma^i r_{t+i} + gamma^T Q_target(s', argmax_j Q(s', chunk_j))."""
    def best(obs):
        chosen = poco.choose_chunks(policy, critic, args.best_of_n, obs.cpu().numpy())
        return torch.as_tensor(chosen, device=obs.device)

    return td_step(SimpleNamespace(sample=best), critic, target_critic, optimizer, batch, args)


def update_policy(policy, target_critic, optimizer, batch, args):
    """Clones the batch, whoever acted in it. Returns: metrics."""
    with poco.mixed_precision(args, batch.obs.device):
        loss = policy.bc_loss(batch.obs, batch.chunk, batch.valid).mean()
    return {"losses/actor_grad_norm": poco.gradient_step(optimizer, loss), "losses/bc_loss": loss.detach()}


if __name__ == "__main__":
    poco.METHOD, poco.Args = "benchmark/qc", Args
    poco.update_critic, poco.update_policy = update_critic, update_policy
    if not any(word.startswith(("--resume", "--evaluate")) for word in sys.argv):  # not the clone's n
        sys.argv[1:1] = ["--best-of-n", str(Args.best_of_n)]  # what is typed comes later and counts
    poco.main()
