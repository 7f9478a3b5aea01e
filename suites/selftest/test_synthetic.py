"""Synthetic weights: activations of realistic size at every depth, the same from the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from reference.config import SIZES, Config, preset, tensor_shapes
from reference.errors import ConfigError
from reference.forward import forward
from reference.synthetic import synthetic


@pytest.mark.parametrize("config", [Config(12, 256, 1024, 500), Config(40, 128, 512, 300), Config(3, 768, 3072, 1000)])
def test_activations_stay_in_range_at_every_depth(config: Config) -> None:
    """Residual RMS within 0.3..30, each half block adds 2..150 % of it, logits spread by 1..10."""
    tokens = np.random.default_rng(0).integers(0, config.n_vocab, 64)
    rms: dict[str, float] = {}
    forward(synthetic(config, 0), tokens, tap=lambda n, x: rms.__setitem__(n, float(np.sqrt(np.mean(x**2)))))
    for i in range(config.n_layer):
        for half in ("att", "ffn"):
            stream = rms[f"blocks.{i}.{half}.residual"]
            assert 0.3 <= stream <= 30, (i, half, stream)
            assert 0.02 <= rms[f"blocks.{i}.{half}.out"] / stream <= 1.5, (i, half)
    assert 1 <= rms["logits"] <= 10


def test_same_seed_same_weights_other_seed_other_weights() -> None:
    config = Config(2, 32, 128, 40)
    a, b, c = synthetic(config, 5), synthetic(config, 5), synthetic(config, 6)
    for name in tensor_shapes(config):
        np.testing.assert_array_equal(a[name].array(), b[name].array())
    assert (a["head.weight"].array() != c["head.weight"].array()).any()
    assert a.synthetic


def test_nothing_is_made_before_it_is_read() -> None:
    assert synthetic("14b").nbytes > 20 << 30


def test_presets_have_the_released_shapes() -> None:
    assert preset("1b5") == Config(24, 2048, 8192, 50277)
    assert preset("7B-World") == Config(32, 4096, 16384, 65536)
    assert preset("raven-3b") == preset("3b-pile") == preset("3b")
    assert {preset(name).n_embd for name in SIZES} == {768, 1024, 2048, 2560, 4096, 5120}
    with pytest.raises(ConfigError, match="did you mean '1b5'"):
        preset("1.5b")
