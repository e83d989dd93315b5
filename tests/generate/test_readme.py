"""What the README shows runs as it stands there."""

import re
from pathlib import Path

import numpy as np

import dsv4_jax
from dsv4_jax.compiles import count_compiles

README = Path(__file__).parents[2] / "README.md"


def test_generate_runs_inside_a_users_jit(monkeypatch, tiny_fp4, shallow):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (example,) = (block for block in blocks if "@jax.jit" in block)
    loaded, found = shallow(tiny_fp4.loaded, 0, quantised=True), {}
    monkeypatch.setattr(dsv4_jax, "load", lambda folder: loaded)

    exec(example, found)

    tokens = np.asarray(found["tokens"])
    assert tokens.shape == (2, 8)
    assert ((tokens >= 0) & (tokens < loaded.config.vocab_size)).all()
    assert (np.asarray(found["mean_logprob"]) < 0).all()
    with count_compiles() as compiles:
        other = found["answer"](loaded.params, found["prompts"][::-1].copy(), np.array([2, 4], np.int32))[0]
    assert compiles.count == 0
    np.testing.assert_array_equal(other, tokens[::-1])
