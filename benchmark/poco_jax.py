"""POCO's update in JAX, the twin that benchmark/speed.py times poco.py against.

A pure function of weights, batch and random draws, compiled whole. Symbols are those of poco.py.
"""

import math

import jax
import jax.numpy as jnp
import optax
import torch
from torch import nn


def to_jax(tensor):
    return jnp.array(tensor.detach().numpy(), jnp.float32)


def layers_of(network):
    """Copies for JAX of weights (in, out) and biases of a policy or of one critic."""
    layers = []
    for module in network.modules():
        if isinstance(module, nn.Linear):
            layers.append((to_jax(module.weight.T), to_jax(module.bias)))
    return layers


def members_of(critic):
    """The layers of each critic of an ensemble."""
    members = zip(critic.hidden, critic.heads, strict=True)
    return [layers_of(nn.ModuleList(member)) for member in members]


def mlp(layers, *inputs, layer_norm=False):
    """Args: inputs (B, ...). Returns: (B, out)."""
    x = jnp.concatenate(inputs, axis=1)
    for weight, bias in layers[:-1]:
        x = x @ weight + bias
        if layer_norm:
            x = jax.nn.standardize(x, epsilon=1e-5)
        x = jax.nn.silu(x)
    weight, bias = layers[-1]
    return x @ weight + bias


def q_of(critic, features, chunk):
    values = [mlp(layers, features, chunk, layer_norm=True) for layers in critic]
    return jnp.stack(values).squeeze(2)  # (M, B)


def sample(policy, features, x_0, num_steps):
    def euler(k, x):
        t = jnp.full((len(x), 1), k / num_steps)
        return x + mlp(policy, features, x, t) / num_steps

    x_1 = jax.lax.fori_loop(0, num_steps, euler, x_0)
    return x_1.clip(-1, 1)


def flow_error(policy, features, chunk, x_0, t):
    x_t = (1 - t) * x_0 + t * chunk
    return (mlp(policy, features, x_t, t) - (chunk - x_0)) ** 2  # (B, D)


def random_draws(args, chunk_dim, normal, uniform):
    """What an update of poco.py draws, in its order. Args: normal, uniform: functions of shapes."""
    batch_size = args.batch_size
    rows = args.posterior_batch_size * args.num_candidates
    return {
        "next_noise": normal((batch_size, chunk_dim)),
        "noise": normal((rows, chunk_dim)),
        "candidate_noise": normal((rows, chunk_dim)),
        "candidate_time": uniform((rows, 1)),
        "bc_noise": normal((batch_size, chunk_dim)),
        "bc_time": uniform((batch_size, 1)),
    }


class Twin:
    """The update, with the weights and the batch of a learner of speed.py."""
    def __init__(self, learner):
        self.args = learner.args
        self.mean = to_jax(learner.policy.encode.mean)
        self.std = to_jax(learner.policy.encode.std)
        self.reward_scale = to_jax(learner.critic.reward_scale)
        self.adam = optax.adam(self.args.learning_rate)
        self.batch = jax.tree.map(to_jax, learner.batch)
        policy = layers_of(learner.policy)
        critic = members_of(learner.critic)
        self.state = {
            "policy": policy,
            "critic": critic,
            "target_critic": members_of(learner.target_critic),
            "policy_adam": self.adam.init(policy),
            "critic_adam": self.adam.init(critic),
        }
        self.key = jax.random.key(0)
        self.compiled = jax.jit(self.update_with_key, donate_argnums=0)

    def step(self):
        """An update with draws of its own, waited for."""
        self.state, self.key, losses = self.compiled(self.state, self.key, self.batch)
        jax.block_until_ready(losses)

    def update_with_key(self, state, key, batch):
        keys = iter(jax.random.split(key, 7))
        next_key = next(keys)

        def normal(shape):
            return jax.random.normal(next(keys), shape)

        def uniform(shape):
            return jax.random.uniform(next(keys), shape)

        draws = random_draws(self.args, batch.chunk.shape[1], normal, uniform)
        state, losses = self.update(state, batch, draws)
        return state, next_key, losses

    def update(self, state, batch, draws):
        """Returns: the new state, the losses by poco.py's names."""
        args = self.args
        features = ((batch.obs - self.mean) / self.std).clip(-10, 10)
        next_features = ((batch.next_obs - self.mean) / self.std).clip(-10, 10)

        # the critics
        next_chunk = sample(state["policy"], next_features, draws["next_noise"], args.flow_steps)
        next_q = q_of(state["target_critic"], next_features, next_chunk).mean(0)
        discount = batch.discount * (1 - batch.terminated)
        target = self.reward_scale * batch.reward + discount * next_q

        def critic_loss(critic):
            q = q_of(critic, features, batch.chunk)  # (M, B)
            has_target = jnp.maximum(batch.valid[:, -1], batch.terminated)
            error = (q - target) ** 2 * has_target
            return error.sum() / (len(q) * jnp.maximum(has_target.sum(), 1))

        state, qf_loss = self.gradient_step(state, "critic", critic_loss)
        target_critic = state["target_critic"]
        target_critic = optax.incremental_update(state["critic"], target_critic, args.tau)

        # the policy: E-step, M-step
        states = features[: args.posterior_batch_size]
        candidate_features = jnp.repeat(states, args.num_candidates, axis=0)
        num_steps = 2 * args.flow_steps
        candidates = sample(state["policy"], candidate_features, draws["noise"], num_steps)
        q = q_of(target_critic, candidate_features, candidates).mean(0)
        q = q.reshape(-1, args.num_candidates)
        spread = jnp.maximum(q.std(1, ddof=1, keepdims=True), 1e-12)
        temperature = spread / math.sqrt(-math.log(args.effective_samples))
        weights = jax.nn.softmax(q / temperature, axis=1)

        def policy_loss(policy):
            noise = (draws["candidate_noise"], draws["candidate_time"])
            error = flow_error(policy, candidate_features, candidates, *noise)
            candidate_losses = error.mean(1).reshape(weights.shape)
            noise = (draws["bc_noise"], draws["bc_time"])
            error = flow_error(policy, features, batch.chunk, *noise)
            action_dim = error.shape[1] // args.chunk_size
            mask = jnp.repeat(batch.valid, action_dim, axis=1)
            bc_losses = (error * mask).sum(1) / mask.sum(1)
            clip_threshold = jnp.quantile(jax.lax.stop_gradient(bc_losses), 0.9)
            if args.anchor == "kept":
                kept = jnp.where(batch.kept.any(), batch.kept, 1)
                bc_losses = bc_losses * kept / kept.mean()
            clipped = jnp.minimum(candidate_losses, clip_threshold)
            posterior = (weights * clipped).sum(1).mean()
            return args.posterior_coef * posterior + bc_losses.mean()

        state, actor_loss = self.gradient_step(state, "policy", policy_loss)
        losses = {"losses/qf_loss": qf_loss, "losses/actor_loss": actor_loss}
        return state | {"target_critic": target_critic}, losses

    def gradient_step(self, state, name, loss):
        value, gradient = jax.value_and_grad(loss)(state[name])
        change, adam = self.adam.update(gradient, state[f"{name}_adam"])
        weights = optax.apply_updates(state[name], change)
        return state | {name: weights, f"{name}_adam": adam}, value


def largest_difference(learner):
    """Of losses and weights, after three updates of a learner and its twin with the same draws."""
    twin = Twin(learner)
    update = jax.jit(twin.update)
    state = twin.state
    differences = []
    for seed in range(3):
        torch.manual_seed(seed)
        draws = random_draws(learner.args, learner.policy.chunk_dim, torch.randn, torch.rand)
        torch.manual_seed(seed)
        metrics = learner.update()
        state, losses = update(state, twin.batch, jax.tree.map(to_jax, draws))
        for name, loss in losses.items():
            differences.append(abs(float(loss) - float(metrics[name])))
    weights = Twin(learner).state
    for name in ("policy", "critic", "target_critic"):
        ours = jax.tree.leaves(weights[name])
        theirs = jax.tree.leaves(state[name])
        for our, their in zip(ours, theirs, strict=True):
            differences.append(float(jnp.abs(our - their).max()))
    return max(differences)
