"""Times the updates of poco.py and ogpo.py: POCO's beside its twin in JAX, both against a limit.

    pip install -r benchmark/requirements.txt
    python benchmark/speed.py                 all sizes; on a GPU without JAX
    taskset -c 0 python benchmark/speed.py    on one core, torch and JAX alike

The limit is the time of an update's matrix products alone, at the rate of a large one. Leave the
machine to it: threads that wait for a busy core spoil every number.
"""

import copy
import math
import os
import statistics
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's idle threads would slow JAX

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ogpo
import poco

VECTOR = gym.spaces.Box(-np.inf, np.inf, (28,), np.float64)  # of FetchPickAndPlace
IMAGE = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
CAMERAS = gym.spaces.Dict({"front": IMAGE, "side": IMAGE, "state": VECTOR})
ACTION_DIM = 4
PAPER = {"hidden_dim": 512, "flow_steps": 10, "gamma": 0.99}
SIZES = {
    "POCO, the defaults": poco.Args(gamma=0.96),
    "POCO, the paper's size": poco.Args(num_candidates=32, posterior_batch_size=256, **PAPER),
    "OGPO, the defaults": ogpo.Args(gamma=0.96),
    "OGPO, the paper's size": ogpo.Args(group_size=32, ppo_batch_size=256, num_critics=10, **PAPER),
    "POCO, two cameras, batch 64": poco.Args(gamma=0.96, batch_size=64),
    "OGPO, two cameras, batch 64": ogpo.Args(gamma=0.96, batch_size=64),
}
CHECKED = poco.Args(  # a rate at which a wrong update shows at once
    bf16=False,
    hidden_dim=32,
    batch_size=16,
    posterior_batch_size=8,
    learning_rate=0.01,
    gamma=0.96,
)


@dataclass
class Args:
    only: str = ""  # the sizes whose names contain this
    rounds: int = 7  # of 0.3 seconds; what is printed are medians over rounds


# Updates
class Learner:
    """Networks, optimisers and a random batch for the updates of either script."""
    def __init__(self, args, device="cpu", obs_space=VECTOR):
        torch.manual_seed(0)
        self.args = args
        self.script = ogpo if isinstance(args, ogpo.Args) else poco
        policy, critic = self.script.make_networks(args, obs_space, ACTION_DIM)
        for network in (policy, critic):
            network.encode.mean.fill_(0.1)
            network.encode.std.fill_(2)
        critic.reward_scale.fill_(0.5)
        self.policy = policy.to(device)
        self.critic = critic.to(device)
        self.target_critic = copy.deepcopy(critic)
        adam = partial(torch.optim.Adam, lr=args.learning_rate, fused=True)
        self.actor_optimizer = adam(policy.parameters())
        self.q_optimizer = adam(critic.parameters())
        self.batch = random_batch(args, device, obs_space)
        self.actors = (policy,)
        self.batches = [self.batch]
        if self.script is ogpo:
            self.actors = (policy, copy.deepcopy(policy), copy.deepcopy(policy))
            self.batches = [self.batch, self.batch]  # the second as its successes

    def update(self):
        """One of the critics, then one of the policy. Returns: metrics."""
        networks = (self.policy, self.critic, self.target_critic)
        metrics = self.script.update_critic(*networks, self.q_optimizer, self.batch, self.args)
        parts = (*self.actors, self.target_critic, self.actor_optimizer)
        return metrics | self.script.update_policy(*parts, *self.batches, self.args)


def random_batch(args, device, obs_space):
    """Windows as of a replay buffer, some of them cut short by their episode's end."""
    batch_size = args.batch_size
    layout = poco.Layout(obs_space)
    obs_space.seed(0)
    rows = [layout.pack(obs_space.sample()) for _ in range(2 * batch_size)]
    obs, next_obs = torch.from_numpy(np.array(rows)).chunk(2)
    left = torch.randint(1, 6, (batch_size, 1))
    batch = poco.Batch(
        obs=obs,
        chunk=torch.empty(batch_size, args.chunk_size * ACTION_DIM).uniform_(-1, 1),
        reward=-torch.rand(batch_size),
        next_obs=next_obs,
        discount=torch.full((batch_size,), 0.9),
        terminated=(left[:, 0] == 1).float(),
        kept=(torch.rand(batch_size) < 0.7).float(),
        valid=(torch.arange(args.chunk_size) < left).float(),
    )
    return poco.Batch(*[column.to(device) for column in batch])


def find_twin(device):
    """Returns: the module with POCO's twin in JAX, None where it cannot be timed.
    Raises: UserError if it does something else than poco.py."""
    if device == "cuda":
        return None  # benchmark/requirements.txt has JAX for the CPU
    try:
        import jax
        import poco_jax
    except ModuleNotFoundError as error:
        print(f"{error}; to time JAX too: pip install -r benchmark/requirements.txt")
        return None
    difference = poco_jax.largest_difference(Learner(CHECKED))
    poco.require(difference < 1e-3, f"torch and JAX differ by {difference:.0e}.")
    print(f"JAX {jax.__version__}: the same updates as torch up to {difference:.0e}")
    return poco_jax


# Times
def seconds_per_call(call, count):
    begin = time.perf_counter()
    for _ in range(count):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / count


def median_seconds(calls, rounds):
    """Of each call, in turns, so that a slow moment meets all. Returns: by name."""
    counts = {}
    for name, call in calls.items():
        seconds_per_call(call, 5)  # compiles, records graphs
        counts[name] = math.ceil(0.3 / seconds_per_call(call, 1))
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds_per_call(call, counts[name]))
    return {name: statistics.median(values) for name, values in times.items()}


def matmul_rate(device, dtype):
    """FLOP/s of a large matrix product, the best of several."""
    n = 8192 if device == "cuda" else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    times = [seconds_per_call(partial(torch.mm, a, a), 1) for _ in range(8)]
    return 2 * n**3 / min(times)


def matmul_flops(learner):
    """Of all matrix products of an update, two for a multiply-add."""
    with FlopCounterMode(display=False) as counter:
        learner.update()
    return counter.get_total_flops()


def time_size(name, device, rate, rounds, twin):
    """Prints the times of an update and their ratios."""
    obs_space = CAMERAS if "cameras" in name else VECTOR
    learner = Learner(SIZES[name], device, obs_space)
    flops = matmul_flops(learner)
    limit = flops / rate
    calls = {"torch": learner.update}
    if twin and learner.script is poco and obs_space is VECTOR:
        calls["JAX"] = twin.Twin(learner).step
    times = median_seconds(calls, rounds)
    print(f"\n{name}: {flops / 1e9:.2f} GFLOP an update, limit {1e3 * limit:.2f} ms")
    print(f"{'':<16}{'ms':>9}{'updates/s':>11}{'limit / time':>14}{'time / torch':>14}")
    for mode, seconds in times.items():
        row = f"{mode:<16}{1e3 * seconds:>9.2f}{1 / seconds:>11.1f}"
        print(f"{row}{limit / seconds:>14.2f}{seconds / times['torch']:>14.2f}")


def main(args):
    names = [name for name in SIZES if args.only in name]
    poco.require(names, f"--only {args.only} is part of none of: {'; '.join(SIZES)}.")
    device = "cpu"
    processor = torch.cpu.get_capabilities().get("cpu_name", "CPU")
    if torch.cuda.is_available():
        device = "cuda"
        processor = torch.cuda.get_device_name()
    print(f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    twin = find_twin(device)
    rates = [matmul_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)]
    listed = ", in bfloat16 ".join(f"{rate / 1e9:,.0f}" for rate in rates)
    print(f"GFLOP/s of a large product in float32 {listed}; limits are at the better")
    for name in names:
        time_size(name, device, max(rates), args.rounds, twin)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except poco.UserError as error:
        print(f"speed.py: {error}", file=sys.stderr)
        sys.exit(2)
