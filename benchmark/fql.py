"""FQL (arXiv 2502.02538) over action chunks in poco.py's place: a one-step policy climbs the gradient of Q.

    python benchmark/fql.py --policy runs/.../clone.pt    takes poco.py's arguments, and --alpha

The flow goes on cloning poco.py's batches. The one-step policy mu(s, z) acts and is in the TD target; it is
held to the flow's end from the same noise z, and its Q is maximised. While the critics warm up it learns to
be the clone. Q is the target critics', as in poco.py, normalised as the public code advises for new tasks.
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import poco

FlowPolicy, check_as_poco, td_step = poco.FlowPolicy, poco.check, poco.update_critic  # before they change


@dataclass
class Args(poco.Args):
    best_of_n: int = 1  # act with the best of n candidates by the target critics
    alpha: float = 10.0  # weight of the distance to the flow's end


class OneStepPolicy(FlowPolicy):
    """The flow, and beside it mu(s, z), with the same layers, but for the time."""
    def __init__(self, obs_dim, chunk_dim, hidden_dim=256, flow_steps=5):
        super().__init__(obs_dim, chunk_dim, hidden_dim, flow_steps)
        first, *others = copy.deepcopy(self.net)
        self.one_step = torch.nn.Sequential(torch.nn.Linear(first.in_features - 1, hidden_dim), *others)

    def mu(self, obs, noise):
        """Args: obs (B, O), noise (B, D). Returns: chunks (B, D), not clipped."""
        return poco.in_blocks(self.one_step, torch.cat([self.normalize(obs), noise], dim=1))

    def sample(self, obs, noise=None):
        noise = torch.randn(len(obs), self.chunk_dim, device=obs.device) if noise is None else noise
        return self.mu(obs, noise).clamp(-1, 1)

    def distance(self, obs, noise):
        """L_distill: squared distance of mu to the flow's end, which gets no gradient. Returns: (B,), mu."""
        chunk = self.mu(obs, noise)
        with torch.no_grad():
            end = super().sample(obs, noise)
        return ((chunk - end) ** 2).mean(1), chunk

    def load_state_dict(self, state):
        """A clone's file has the flow alone."""
        own = {name: value for name, value in self.state_dict().items() if name.startswith("one_step.")}
        return super().load_state_dict(own | state)


def fql_loss(bc_losses, distances, q, alpha):
    """mean_s [L_BC + alpha L_distill - Q(s, mu(s, z)) / mean |Q|]. Args: (B,) each. Returns: a scalar."""
    return (bc_losses + alpha * distances - q / q.detach().abs().mean()).mean()


def update_critic(policy, critic, target_critic, optimizer, batch, args):
    """poco.py's TD step; policy.sample is the one-step policy, here distilled while the critics warm up."""
    updates = next((int(state["step"]) for state in optimizer.state.values()), 0)
    metrics = td_step(policy, critic, target_critic, optimizer, batch, args)
    if updates < args.critic_warmup:
        if not hasattr(policy, "adam"):  # in no checkpoint, as none is written before the warm-up ends
            policy.adam = torch.optim.Adam(policy.one_step.parameters(), args.learning_rate, fused=True)
        with poco.mixed_precision(args, batch.obs.device):
            loss = policy.distance(batch.obs, torch.randn_like(batch.chunk))[0].mean()
        poco.gradient_step(policy.adam, loss)
        metrics["losses/distill_loss"] = loss.detach()
    return metrics


def update_policy(policy, target_critic, optimizer, batch, args):
    """One step of the flow and of the one-step policy. Returns: metrics."""
    target_critic.requires_grad_(False)  # the gradient is that of the chunk
    with poco.mixed_precision(args, batch.obs.device):
        bc_losses = policy.bc_loss(batch.obs, batch.chunk, batch.valid)
        distances, chunk = policy.distance(batch.obs, torch.randn_like(batch.chunk))
        q = target_critic(batch.obs, chunk.clamp(-1, 1)).mean(0)
    loss = fql_loss(bc_losses, distances, q, args.alpha)
    return {
        "losses/actor_grad_norm": poco.gradient_step(optimizer, loss),
        "losses/bc_loss": bc_losses.detach().mean(),
        "losses/distill_loss": distances.detach().mean(),
        "losses/actor_q": q.detach().mean(),
    }


def check(args):
    check_as_poco(args)
    poco.require(args.policy and args.dataset != "none", "fql.py needs --policy and its demonstrations.")


if __name__ == "__main__":
    poco.METHOD, poco.Args, poco.FlowPolicy, poco.check = "benchmark/fql", Args, OneStepPolicy, check
    poco.update_critic, poco.update_policy = update_critic, update_policy
    if not any(word.startswith(("--resume", "--evaluate")) for word in sys.argv):  # not the clone's n
        sys.argv[1:1] = ["--best-of-n", str(Args.best_of_n)]  # what is typed comes later and counts
    poco.main()
