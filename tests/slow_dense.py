"""A slow, obvious reference of the fully convolutional form."""

import jax
import jax.numpy as jnp
import numpy as np


def random_variables(model, input_size):
    """Variables with He's scale of the kernels, and BN that leaves no map zero, also beyond the border of an image."""
    random = np.random.RandomState(0)

    def draw(path, leaf):
        values = random.normal(0, 1, leaf.shape)
        name = path[-1].key
        if name == "kernel":
            values *= np.sqrt(2 / np.prod(leaf.shape[-4:-1]))
        else:
            values = {"scale": 1, "bias": 0, "mean": 0, "var": 1.5}[name] + 0.2 * values
        return values.astype(np.float32)

    def initialize(key):
        return model.init(key, jnp.zeros((1, *input_size, 3)), train=False)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(initialize, jax.random.key(0)))


def slow_logits(model, variables, image, window):
    """Pool and classify at every position of the window; average the logits."""
    apply = jax.jit(lambda variables, image: model.apply(variables, image, train=False, method="features"))
    features = apply(variables, image[None])
    feature_map = np.asarray(features[list(model.feature_strides)[-1]][0], np.float64)  # [H, W, C]
    kernel, bias = (np.asarray(variables["params"]["fc"][name], np.float64) for name in ("kernel", "bias"))
    logits = [
        feature_map[top : top + window[0], left : left + window[1]].mean((0, 1)) @ kernel + bias
        for top in range(feature_map.shape[0] - window[0] + 1)
        for left in range(feature_map.shape[1] - window[1] + 1)
    ]
    return np.mean(logits, axis=0), features["logits"][0]
