"""The residual networks for CIFAR-10 of "Deep Residual Learning" (Sec. 4.2) in one file, to be read and forked.

    curl https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz | tar xz
    python examples/minimal.py cifar-10-batches-bin --depth 20

The paper has test errors of 8.75 % with 20 layers, 7.51 with 32, 7.17 with 44 and 6.97 with 56; its 110 layers begin
with a warm-up, which is left out here. N images, H x W pixels, C channels or filters, G groups of BN.
"""

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

he_init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def conv3x3(filters, stride=1, *, name):
    # The margin is explicit: "SAME" would pad an even input of stride 2 by (0, 1), which shifts the sampling grid.
    return nn.Conv(filters, (3, 3), stride, padding=1, use_bias=False, kernel_init=he_init, name=name)


class BatchNorm(nn.Module):
    """Batch normalization whose groups of images have statistics of their own, as the paper's GPUs had."""

    group_size: int

    @nn.compact
    def __call__(self, x, *, train):  # [N, H, W, C] -> [N, H, W, C]
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        if not train:
            return (x - running_mean.value) * (scale * jax.lax.rsqrt(running_var.value + 1e-5)) + bias
        groups = x.reshape(-1, self.group_size, *x.shape[1:])  # [G, N/G, H, W, C]
        mean = groups.mean((1, 2, 3), keepdims=True)  # [G, 1, 1, 1, C]
        var = jnp.square(groups - mean).mean((1, 2, 3), keepdims=True)  # two passes: E[x^2] - E[x]^2 would cancel
        n = groups[0, ..., 0].size
        running_mean.value = 0.9 * running_mean.value + 0.1 * mean.mean((0, 1, 2, 3))
        running_var.value = 0.9 * running_var.value + 0.1 * var.mean((0, 1, 2, 3)) * n / (n - 1)  # unbiased
        return ((groups - mean) * (scale * jax.lax.rsqrt(var + 1e-5)) + bias).reshape(x.shape)


class Block(nn.Module):
    """Two 3x3 convolutions and the identity; where the map shrinks, zero channels make it fit (option A)."""

    filters: int
    stride: int
    group_size: int

    @nn.compact
    def __call__(self, x, *, train):  # [N, H, W, C] -> [N, H/stride, W/stride, filters]
        y = conv3x3(self.filters, self.stride, name="conv1")(x)
        y = nn.relu(BatchNorm(self.group_size, name="bn1")(y, train=train))
        y = conv3x3(self.filters, name="conv2")(y)
        y = BatchNorm(self.group_size, name="bn2")(y, train=train)
        new_channels = (0, self.filters - x.shape[-1])  # at the end
        shortcut = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), new_channels))
        return nn.relu(y + shortcut)


class ResNet(nn.Module):
    depth: int  # 6n+2: 20, 32, 44, 56, ...
    group_size: int = 64  # the paper's 128 images lie on two GPUs

    @nn.compact
    def __call__(self, x, *, train):  # [N, 32, 32, 3] -> [N, 10]
        x = conv3x3(16, name="stem_conv")(x)
        x = nn.relu(BatchNorm(self.group_size, name="stem_bn")(x, train=train))  # [N, 32, 32, 16]
        for stage, filters in enumerate((16, 32, 64), start=1):  # [N, 32, 32, 16], [N, 16, 16, 32], [N, 8, 8, 64]
            for block in range(1, (self.depth - 2) // 6 + 1):
                stride = 2 if stage > 1 and block == 1 else 1
                x = Block(filters, stride, self.group_size, name=f"stage{stage}_block{block}")(x, train=train)
        return nn.Dense(10, kernel_init=he_init, name="fc")(x.mean((1, 2)))  # [N, 64] -> [N, 10]


def read_cifar10(folder, names):
    """Return images [N, 32, 32, 3] uint8 and labels [N] int32 of files of the binary version."""
    files = [np.fromfile(Path(folder) / f"{name}.bin", np.uint8) for name in names]
    rows = np.concatenate(files).reshape(-1, 1 + 3 * 32 * 32)  # the label, then the three planes
    return rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), rows[:, 0].astype(np.int32)


def per_pixel_mean(images):  # [N, 32, 32, 3] uint8 -> [32, 32, 3] float32
    return (images.mean(0, dtype=np.float64) / 255).astype(np.float32)


def shuffled(key, num_images, batch_size):
    """Yield which images make up each batch, [batch_size] int32, for ever: all of them, epoch after epoch."""
    left, epoch = np.zeros(0, np.int32), 0
    while True:
        while len(left) < batch_size:  # a batch may straddle two epochs
            order = jax.random.permutation(jax.random.fold_in(key, epoch), num_images)
            left, epoch = np.concatenate([left, order]), epoch + 1
        yield left[:batch_size]
        left = left[batch_size:]


def normalize(images, mean):  # uint8 -> float32, both [N, 32, 32, 3]
    return images.astype(jnp.float32) / 255 - mean


def augment(key, images):  # [N, 32, 32, 3] -> [N, 32, 32, 3]
    """Pad by 4 pixels, crop at random, mirror half of them."""
    crop_key, flip_key = jax.random.split(key)
    offsets = jax.random.randint(crop_key, (len(images), 2), 0, 9)
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))  # [N, 40, 40, 3]; 0 is the mean
    images = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), (32, 32, 3)))(padded, offsets)
    flip = jax.random.bernoulli(flip_key, 0.5, (len(images), 1, 1, 1))
    return jnp.where(flip, images[:, :, ::-1], images)


schedule = optax.piecewise_constant_schedule(0.1, {32_000: 0.1, 48_000: 0.1})  # divided by 10, twice

optimizer = optax.chain(
    optax.add_decayed_weights(1e-4),  # of all parameters, before the momentum: the L2 penalty
    optax.scale_by_learning_rate(schedule),  # inside the velocity, as in Caffe: v = 0.9 v + rate g, p = p - v
    optax.trace(0.9),
)


class State(NamedTuple):
    params: Any
    batch_stats: Any  # running mean and variance of each BN
    opt_state: Any


def train(images, labels, mean, *, depth, steps, batch_size=128, group_size=64, seed=0):
    """Train on images [N, 32, 32, 3] uint8 and labels [N] int32; yield the state and the loss of every step."""
    model = ResNet(depth, group_size)
    init_key, data_key = jax.random.split(jax.random.key(seed))
    order_key, augment_key = jax.random.split(data_key)
    variables = jax.jit(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False))(init_key)
    state = State(**variables, opt_state=optimizer.init(variables["params"]))
    split = jax.device_put((images, labels))  # 150 MB on the device

    @jax.jit
    def train_step(state, split, indices, step):
        images, labels = split[0][indices], split[1][indices]  # [N, 32, 32, 3], [N]
        images = augment(jax.random.fold_in(augment_key, step), normalize(images, mean))

        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates["batch_stats"]

        (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), batch_stats, opt_state), loss

    for step, indices in zip(range(steps), shuffled(order_key, len(labels), batch_size), strict=False):
        state, loss = train_step(state, split, indices, step)
        yield state, loss


def evaluate(state, images, labels, mean, *, depth, batch_size=500):
    """Return the error in % on all images; the last batch is padded with images that do not count."""
    wrong = 0
    for start in range(0, len(labels), batch_size):
        x, y = images[start : start + batch_size], labels[start : start + batch_size]
        mask = np.arange(batch_size) < len(y)  # [N]
        x, y = (np.pad(a, [(0, batch_size - len(a))] + [(0, 0)] * (a.ndim - 1)) for a in (x, y))
        wrong += int(count_wrong(state, x, y, mask, mean, depth))
    return 100 * wrong / len(labels)


@jax.jit(static_argnums=5)
def count_wrong(state, images, labels, mask, mean, depth):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = ResNet(depth).apply(variables, normalize(images, mean), train=False)  # [N, 10]
    return ((logits.argmax(-1) != labels) & mask).sum()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", help="the folder cifar-10-batches-bin")
    parser.add_argument("--depth", type=int, default=20, help="6n+2")
    parser.add_argument("--steps", type=int, default=64_000)
    options = parser.parse_args()
    train_split = read_cifar10(options.dir, [f"data_batch_{number}" for number in range(1, 6)])
    test_split = read_cifar10(options.dir, ["test_batch"])
    mean = per_pixel_mean(train_split[0])
    began = time.perf_counter()
    for step, (state, loss) in enumerate(train(*train_split, mean, depth=options.depth, steps=options.steps), start=1):
        if step % 100 == 0:
            print(f"step {step:6,}  loss {loss:.4f}  {time.perf_counter() - began:6.0f} s", flush=True)
        if step % 1000 == 0 or step == options.steps:
            print(f"test error {evaluate(state, *test_split, mean, depth=options.depth):.2f} %", flush=True)


if __name__ == "__main__":
    main()
