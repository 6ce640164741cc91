"""FQL (arXiv 2502.02538) over chunks in poco.py's place: a one-step policy climbs Q's gradient.

    python benchmark/fql.py --policy runs/.../clone.pt    takes poco.py's arguments, and --alpha

The flow goes on cloning poco.py's batches. The one-step policy mu(s, z) acts and is in the TD
target; it is held to the flow's end from the same noise z, and its Q is maximised. While the
critics warm up it learns to be the clone. Q is the target critics', as in poco.py, normalised as
the public code advises for new tasks.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import poco
from poco import update_critic as td_step


@dataclass
class Args(poco.Args):
    best_of_n: int = 1  # act with the best of n candidates by the target critics
    policy_start: int = 0  # steps before the policy learns
    alpha: float = 10.0  # weight of the distance to the flow's end


class OneStepPolicy(poco.FlowPolicy):
    """The flow, and beside it mu(s, z), with the same layers, but for the time and dropout."""
    def __init__(self, encode: nn.Module, chunk_dim: int, hidden_dim=256, flow_steps=5):
        super().__init__(encode, chunk_dim, hidden_dim, flow_steps)
        layers = []
        for in_dim in (encode.feature_dim + chunk_dim, hidden_dim, hidden_dim):
            layers += [nn.Linear(in_dim, hidden_dim), nn.SiLU()]
        self.one_step = nn.Sequential(*layers, nn.Linear(hidden_dim, chunk_dim))

    def mu(self, features: Tensor, noise: Tensor) -> Tensor:
        """Args: noise (B, D). Returns: chunks (B, D), not clipped."""
        return self.one_step(torch.cat([features, noise], dim=1))

    def sample(self, features: Tensor) -> Tensor:
        """Returns: chunks (B, D) of the one-step policy in [-1, 1]."""
        noise = torch.randn(len(features), self.chunk_dim, device=features.device)
        return self.mu(features, noise).clamp(-1, 1)

    @torch.no_grad()
    def flow_end(self, features: Tensor, noise: Tensor) -> Tensor:
        """poco.FlowPolicy's sample, from a given noise (B, D)."""
        x = noise
        for k in range(self.flow_steps):
            t = torch.full_like(x[:, :1], k / self.flow_steps)
            x = x + self.velocity(features, x, t) / self.flow_steps
        return x.clamp(-1, 1)

    def distance(self, features: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """L_distill: squared distance of mu to the flow's end, which gets no gradient.
        Returns: (B,), mu's chunks (B, D)."""
        chunk = self.mu(features, noise)
        end = self.flow_end(features, noise)
        return ((chunk - end) ** 2).mean(1), chunk

    def load_state_dict(self, state):
        """A clone's file has the flow alone: the one-step policy then keeps its weights."""
        one_step = self.one_step.state_dict(prefix="one_step.")
        return super().load_state_dict(one_step | state)


def make_networks(args, obs_space, action_dim):
    """poco.py's, with the one-step policy beside the flow."""
    complete = args.policy and args.dataset != "none"
    poco.require(complete, "FQL needs --policy and demonstrations.")
    flow, critic = poco.make_networks(args, obs_space, action_dim)
    policy = OneStepPolicy(flow.encode, flow.chunk_dim, args.hidden_dim, args.flow_steps)
    parameters = policy.one_step.parameters()
    policy.warmup_optimizer = torch.optim.Adam(parameters, args.learning_rate, fused=True)
    return policy, critic


def fql_loss(bc_losses: Tensor, distances: Tensor, q: Tensor, alpha: float) -> Tensor:
    """mean_s [L_BC + alpha L_distill - Q(s, mu(s, z)) / mean |Q|]. Args: (B,) each.
    Returns: a scalar."""
    normal_q = q / q.detach().abs().mean()
    return (bc_losses + alpha * distances - normal_q).mean()


def update_critic(policy, critic, target_critic, optimizer, batch, args):
    """poco.py's TD step on chunks of the one-step policy, which is distilled while the critics warm
    up. Returns: metrics."""
    metrics = td_step(policy, critic, target_critic, optimizer, batch, args)
    state = next(iter(optimizer.state.values()))  # of one of its weights
    if state["step"] <= args.critic_warmup:  # no checkpoint is written meanwhile
        with poco.mixed_precision(args, batch.obs.device):
            features = policy.encode(batch.obs)
            distances, _ = policy.distance(features, torch.randn_like(batch.chunk))
        loss = distances.mean()
        poco.gradient_step(policy.warmup_optimizer, loss)
        metrics["losses/distill_loss"] = loss.detach()
    return metrics


def update_policy(policy, target_critic, optimizer, batch, args):
    """One step of the flow and of the one-step policy. Returns: metrics."""
    target_critic.requires_grad_(False)  # the gradient is that of the chunk
    with poco.mixed_precision(args, batch.obs.device):
        features = policy.encode(batch.obs)
        bc_losses = policy.bc_loss(features, batch.chunk, batch.valid)
        distances, chunk = policy.distance(features, torch.randn_like(batch.chunk))
        critic_features = target_critic.encode(batch.obs)
        q = target_critic(critic_features, chunk.clamp(-1, 1)).mean(0)
    loss = fql_loss(bc_losses, distances, q, args.alpha)
    grad_norm = poco.gradient_step(optimizer, loss)
    return {
        "losses/actor_grad_norm": grad_norm,
        "losses/bc_loss": bc_losses.detach().mean(),
        "losses/distill_loss": distances.detach().mean(),
        "losses/actor_q": q.detach().mean(),
    }


if __name__ == "__main__":
    poco.METHOD = "benchmark/fql"
    poco.Args = Args
    poco.update_critic = update_critic
    poco.update_policy = update_policy
    if any(word.startswith("--policy") for word in sys.argv):  # not what the clone's file has
        own = ["--best-of-n", str(Args.best_of_n), "--policy-start", str(Args.policy_start)]
        sys.argv[1:1] = own  # what is typed comes later and counts
    poco.main(make_networks)
