"""What the newer families add to the decoder, on a mesh: one device's numbers and gradients."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import load_pretrained
from jaxalign.models.decoder import Layout, logits
from jaxalign.models.lora import init_adapters, with_adapters
from jaxalign.sharding import make_mesh, place, shard_batch

FIXTURES = Path(__file__).parents[1] / "fixtures" / "models"
CASES = ("cohere2_biases", "glm4", "granite", "olmo3_yarn", "smollm3_window")


@pytest.mark.parametrize("case", CASES)
def test_a_mesh_gives_the_numbers_and_gradients_of_one_device(case, rng):
    model = load_pretrained(FIXTURES / case)
    tokens = rng.integers(3, model.config.vocab_size, (4, 10)).astype(np.int32)
    real = np.arange(10) >= np.array([0, 3, 1, 6])[:, None]
    adapters = init_adapters(model.params, jax.random.key(0), rank=2, targets=("*",))
    adapters = jax.tree.map(lambda x: x + 0.2 * rng.normal(size=x.shape).astype("f"), adapters)

    def loss(both, tokens, mask):
        params = with_adapters(both["params"], both["adapters"], 0.5)
        out = logits(params, model.config, tokens, Layout(attention_mask=mask))
        return jnp.mean(jnp.where(mask[..., None] != 0, jnp.tanh(out), 0))

    run = jax.jit(jax.value_and_grad(loss))
    both = {"params": model.params, "adapters": adapters}
    expected, gradients = run(both, tokens, real.astype(np.int32))
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    batch = shard_batch({"tokens": tokens, "mask": real.astype(np.int32)}, mesh)
    found, sharded = run(place(both, mesh), batch["tokens"], batch["mask"])
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-6), sharded, gradients
    )
