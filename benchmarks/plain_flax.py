"""The peer "plain Flax": the same networks and step as one writes them first, in the manner of Flax's own examples."""

from __future__ import annotations

import math
import time
from functools import partial
from itertools import cycle, islice
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.cases import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Case, Prepared
from benchmarks.ours import peak_device_bytes


class Block(nn.Module):
    """Basic or bottleneck block; the shortcut is a projection or padded with zero channels."""

    filters: int
    stride: int
    bottleneck: bool
    projection: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype)
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9, dtype=self.dtype)
        if self.bottleneck:
            y = nn.relu(norm()(conv(self.filters, (1, 1), self.stride)(x)))
            y = nn.relu(norm()(conv(self.filters, (3, 3))(y)))
            y = norm()(conv(4 * self.filters, (1, 1))(y))
        else:
            y = nn.relu(norm()(conv(self.filters, (3, 3), self.stride)(x)))
            y = norm()(conv(self.filters, (3, 3))(y))
        if x.shape != y.shape and self.projection:
            x = norm()(conv(y.shape[-1], (1, 1), self.stride)(x))
        elif x.shape != y.shape:
            new_channels = y.shape[-1] - x.shape[-1]
            x = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (0, new_channels)))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """CIFAR (three stages, option A) or ImageNet (four stages, option B)."""

    blocks: tuple[int, ...]
    bottleneck: bool
    num_classes: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        imagenet = len(self.blocks) == 4
        filters = 64 if imagenet else 16
        size, stride = (7, 2) if imagenet else (3, 1)
        x = nn.Conv(filters, (size, size), stride, use_bias=False, dtype=self.dtype)(x)
        x = nn.relu(nn.BatchNorm(not train, momentum=0.9, dtype=self.dtype)(x))
        if imagenet:
            x = nn.max_pool(x, (3, 3), (2, 2), padding="SAME")
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(filters * 2**stage, stride, self.bottleneck, imagenet, self.dtype)(x, train)
        return nn.Dense(self.num_classes)(x.mean((1, 2)).astype(jnp.float32))


class VGG16(nn.Module):
    """Configuration D."""

    num_classes: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for filters, convs in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(convs):
                x = nn.relu(nn.Conv(filters, (3, 3), dtype=self.dtype)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.Dropout(0.5, deterministic=not train)(nn.relu(nn.Dense(4096, dtype=self.dtype)(x)))
        return nn.Dense(self.num_classes)(x.astype(jnp.float32))


def build(case: Case) -> nn.Module:
    """Return the network of a case."""
    dtype = jnp.dtype(case.dtype)
    if case.family == "vgg":
        return VGG16(case.num_classes, dtype)
    return ResNet(case.num_blocks, case.family == "imagenet" and case.depth >= 50, case.num_classes, dtype)


def prepare(case: Case) -> Prepared:
    """Make the batches, initialize and compile, on one device."""
    network = build(case)
    rng = np.random.default_rng(0)
    shape = (case.batch_size, case.image_size, case.image_size, 3)
    pool = []
    for _ in range(case.pool_batches):
        images = rng.standard_normal(shape, np.float32)
        pool.append(jax.device_put((images, rng.integers(0, case.num_classes, case.batch_size, np.int32))))
    batches = cycle(pool)
    variables = _initialize(network, pool[0][0])
    optimizer = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, momentum=MOMENTUM))

    @partial(jax.jit, donate_argnums=0)
    def train_step(state: Any, images: jax.Array, labels: jax.Array) -> tuple[Any, jax.Array]:
        step, params, batch_stats, opt_state = state

        def loss_fn(params: Any) -> tuple[jax.Array, Any]:
            rngs = {"dropout": jax.random.fold_in(jax.random.key(2), step)}
            stated = {"params": params, "batch_stats": batch_stats}
            logits, updates = network.apply(stated, images, train=True, mutable=["batch_stats"], rngs=rngs)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, updates.get("batch_stats", {})

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (step + 1, optax.apply_updates(params, updates), batch_stats, opt_state), loss

    params = variables["params"]
    state = (jnp.int32(0), params, variables.get("batch_stats", {}), optimizer.init(params))
    train = case.mode == "train"
    forward = jax.jit(partial(network.apply, train=False))
    began = time.perf_counter()
    compiled = (train_step.lower(state, *pool[0]) if train else forward.lower(variables, pool[0][0])).compile()
    compile_seconds = time.perf_counter() - began

    def run_train(steps: int) -> None:
        nonlocal state
        for images, labels in islice(batches, steps):
            state, _ = compiled(state, images, labels)
        jax.block_until_ready(state)

    def run_inference(steps: int) -> None:
        jax.block_until_ready([compiled(variables, images) for images, _ in islice(batches, steps)])

    settings = {"devices": f"1 {jax.default_backend()}"}
    return Prepared(run_train if train else run_inference, 1, compile_seconds, peak_device_bytes, settings)


def _initialize(network: nn.Module, images: jax.Array) -> Any:
    """Return random variables: drawn by NumPy, for JAX's initializers take longer to compile than a training step."""
    rng = np.random.default_rng(1)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key != "kernel":
            return jnp.full(leaf.shape, 1.0 if path[-1].key in ("scale", "var") else 0.0)
        std = (2 / math.prod(leaf.shape[:-1])) ** 0.5  # He initialization
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * np.float32(std))

    shapes = jax.eval_shape(partial(network.init, train=False), jax.random.key(0), images)
    return jax.tree_util.tree_map_with_path(draw, shapes)
