"""Q-chunking (arXiv 2507.07969) in poco.py's place: the policy goes on cloning, critics choose.

    python benchmark/qc.py --policy runs/.../clone.pt    takes poco.py's arguments

Acting and the TD target take the best of --best-of-n chunks, 32 as in the paper. The policy is
not improved: it clones poco.py's batches, demonstrations and what was chosen. As in the public
code the critics choose the next chunk and the target critics value it; in acting the target
critics choose, as in poco.py.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import poco
from poco import update_critic as td_step


@dataclass
class Args(poco.Args):
    best_of_n: int = 32  # act with the best of n candidates, and value the next state by it
    eval_best_of_n: int = 32  # the same for evaluations
    td_steps: int | None = 1  # at least T, so T, as in the paper
    policy_start: int = 0  # steps before the policy learns


@dataclass
class BestOfN:
    """The policy whose next chunk poco.py's TD step values: the critics' best of n."""
    policy: torch.nn.Module
    critic: torch.nn.Module
    best_of_n: int

    def encode(self, obs):
        return obs  # sample encodes for policy and critics

    def sample(self, obs):
        """Returns: a chunk for each observation, (B, D)."""
        n = self.best_of_n
        features = self.policy.encode(obs).repeat_interleave(n, dim=0)
        chunks = self.policy.sample(features)  # (B * n, D)
        critic_features = self.critic.encode(obs).repeat_interleave(n, dim=0)
        q = self.critic(critic_features, chunks).mean(0)
        best = q.view(-1, n).argmax(1)  # (B,)
        first = torch.arange(0, len(chunks), n, device=obs.device)
        return chunks[first + best]


def update_critic(policy, critic, target_critic, optimizer, batch, args):
    """poco.py's TD step towards sum_i gamma^i r_{t+i} + gamma^T Q_target(s', chunk_j), where j is
    argmax_j Q(s', chunk_j). Returns: metrics."""
    chooser = BestOfN(policy, critic, args.best_of_n)
    return td_step(chooser, critic, target_critic, optimizer, batch, args)


def update_policy(policy, target_critic, optimizer, batch, args):
    """Clones the batch, whoever acted in it. Returns: metrics."""
    return poco.update_clone(policy, optimizer, batch)


if __name__ == "__main__":
    poco.METHOD = "benchmark/qc"
    poco.Args = Args
    poco.update_critic = update_critic
    poco.update_policy = update_policy
    if any(word.startswith("--policy") for word in sys.argv):  # not what the clone's file has
        own = ["--best-of-n", str(Args.best_of_n), "--policy-start", str(Args.policy_start)]
        own += ["--td-steps", str(Args.td_steps), "--eval-best-of-n", str(Args.eval_best_of_n)]
        sys.argv[1:1] = own  # what is typed comes later and counts
    poco.main()
