"""The kernel of gradients and Gram matrices = products written out in float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import gram_kernel
from jaxalign.models.devices import compiling_for


@pytest.mark.parametrize("tokens", [64, 70])
@pytest.mark.parametrize(("pairs", "inputs", "outputs"), [(3, 64, 192), (1, 128, 128)])
def test_kernel_sums_all_rows_and_compares_those_of_a_pair(tokens, pairs, inputs, outputs, rng):
    x, dy = (
        jnp.asarray(rng.normal(size=(pairs, 2, tokens, size)), jnp.bfloat16)
        for size in (inputs, outputs)
    )
    total, gram = gram_kernel.gradient_and_gram(x, dy, interpret=True)
    each = np.einsum("pnti,pnto->pnio", np.asarray(x, np.float64), np.asarray(dy, np.float64))
    chosen, rejected = each.reshape(pairs, 2, -1).swapaxes(0, 1)
    expected = [np.sum(a * b, -1) for a, b in ((chosen,) * 2, (rejected,) * 2, (chosen, rejected))]
    np.testing.assert_allclose(total, each.sum((0, 1)), atol=2e-4)
    np.testing.assert_allclose(gram, np.stack(expected, -1), rtol=1e-5, atol=1e-2)


def test_kernel_is_for_one_gpu_and_matrices_of_whole_tiles():
    with compiling_for("gpu", 1):
        assert gram_kernel.fits(jnp.bfloat16, 2048, 512)
        assert not gram_kernel.fits(jnp.float32, 2048, 512)
        assert not gram_kernel.fits(jnp.bfloat16, 2048, 16)
    with compiling_for("gpu", 2):
        assert not gram_kernel.fits(jnp.bfloat16, 2048, 512)
    assert not gram_kernel.fits(jnp.bfloat16, 2048, 512)
