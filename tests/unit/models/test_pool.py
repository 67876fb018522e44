"""The max pool and its gradient, against PyTorch and against loops."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resnet_jax.models.pool import MaxPool, stem_pool

POOLS = {
    "caffe": stem_pool("caffe"),
    "torch": stem_pool("torch"),
    "vgg": MaxPool(2, 2),
    "wide": MaxPool(5, 2, margin=2),
}
SIZES = [(8, 8), (9, 12), (11, 7)]


@partial(jax.jit, static_argnums=0)
def pool_and_pull_back(pool, x, dy):
    y, vjp = jax.vjp(lambda x: pool.apply({}, x), x)
    return y, vjp(dy)[0]


def example(pool, size, dtype=np.float32):
    """Return x with many ties, most of them zeros as behind a rectifier, and a dy for it."""
    rng = np.random.default_rng(0)
    x = np.maximum(rng.integers(-3, 3, (2, *size, 5)), 0).astype(dtype)
    dy = rng.normal(size=jax.eval_shape(lambda x: pool.apply({}, x), x).shape).astype(dtype)
    return x, dy


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_value_and_gradient_are_those_of_pytorch(pool, size):
    torch = pytest.importorskip("torch")
    x, dy = example(pool, size)
    y, dx = pool_and_pull_back(pool, x, dy)
    theirs = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    out = torch.nn.functional.max_pool2d(theirs, pool.size, pool.stride, pool.margin, ceil_mode=pool.ceil)
    out.backward(torch.tensor(dy.transpose(0, 3, 1, 2)))
    np.testing.assert_array_equal(y, out.detach().numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(dx, theirs.grad.numpy().transpose(0, 2, 3, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_every_window_gives_its_gradient_to_its_first_maximum(pool, size):
    x, dy = example(pool, size)
    expected = np.zeros(x.shape)
    for n, i, j, c in np.ndindex(dy.shape):
        rows, columns = (
            slice(max(start, 0), start + pool.size) for start in (k * pool.stride - pool.margin for k in (i, j))
        )
        window = x[n, rows, columns, c]
        row, column = np.unravel_index(window.argmax(), window.shape)  # the first
        expected[n, rows.start + row, columns.start + column, c] += dy[n, i, j, c]
    np.testing.assert_allclose(pool_and_pull_back(pool, x, dy)[1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pool", POOLS.values(), ids=POOLS)
def test_differentiating_changes_no_value_and_nan_stays(pool):
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 3)).at[1, 4, 4, 1].set(jnp.nan)
    y = pool.apply({}, x)
    np.testing.assert_array_equal(y, pool_and_pull_back(pool, x, y)[0])
    np.testing.assert_array_equal(np.isnan(y).any((1, 2)), [[False] * 3, [False, True, False]])


def test_bfloat16_is_summed_in_float32():
    """One pixel is the maximum of four windows, whose gradients are 256 and three times 1: 259 rounds to 260."""
    x = jnp.zeros((1, 5, 5, 1), jnp.bfloat16).at[0, 2, 2, 0].set(1)
    dy = jnp.array([[256, 1], [1, 1]], jnp.bfloat16).reshape(1, 2, 2, 1)
    dx = pool_and_pull_back(POOLS["caffe"], x, dy)[1]
    assert dx.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dx[0, 2, 2, 0], 260)  # bfloat16 has 8 digits: 256 + 1 + 1 + 1 would stay 256
    assert jnp.count_nonzero(dx) == 1


@pytest.mark.parametrize(("platform", "scatters"), [("cpu", False), ("cuda", False), ("tpu", True)])
def test_only_on_tpus_the_gradient_is_a_scatter(platform, scatters):
    traced = pool_and_pull_back.trace(POOLS["caffe"], *example(POOLS["caffe"], (8, 8)))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("scatter" in program) == scatters


def test_the_compiled_gradient_has_one_of_the_two_forms():
    compiled = pool_and_pull_back.lower(POOLS["caffe"], *example(POOLS["caffe"], (8, 8))).compile()
    assert "conditional" not in compiled.as_text()
