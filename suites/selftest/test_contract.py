"""The contract of backends/api.py, over every backend and scheme that is usable here."""

from __future__ import annotations

import re

import numpy as np
import pytest

from backends.api import BackendInfo, Generating, Scoring, StateAccess, Traceable, Unsupported
from backends.index import UnknownBackend, backend_names, load_backend
from harness.models import Model
from harness.session import Opened, open_session
from reference.config import Config, tensor_shapes
from reference.errors import ConfigError, TokenError
from reference.forward import forward, initial_state
from reference.schemes import SCHEMES
from reference.synthetic import synthetic

TOKENS = [3, 1, 4, 1, 5]


@pytest.mark.parametrize("name", [*backend_names(), "faulty"])
def test_info_is_complete(name: str) -> None:
    info: BackendInfo = load_backend(name).INFO
    assert info.name == name
    assert info.description
    assert info.origin
    assert info.devices
    assert info.schemes
    for scheme in info.schemes:
        assert scheme in SCHEMES, "a scheme without a codec has no kernel parity; say so in the row first"
        for device in info.devices:
            assert info.arithmetic(scheme, device)


def test_forward_returns_host_float32_logits_and_a_state(opened: Opened, model: Model) -> None:
    logits, state = opened.session.forward(TOKENS, None)
    assert isinstance(logits, np.ndarray)
    assert logits.dtype == np.float32
    assert logits.shape == (model.config.n_vocab,)
    assert np.isfinite(logits).all()
    assert state is not None


def test_tokens_may_be_any_sequence_of_integers(opened: Opened) -> None:
    wanted, _ = opened.session.forward(TOKENS, None)
    for tokens in (tuple(TOKENS), np.array(TOKENS), np.array(TOKENS, np.int32)):
        np.testing.assert_array_equal(opened.session.forward(tokens, None)[0], wanted)  # type: ignore[arg-type]


def test_what_was_returned_is_not_written_to_later(opened: Opened) -> None:
    logits, state = opened.session.forward(TOKENS, None)
    kept = logits.copy()
    opened.session.forward([9], state)
    opened.session.forward([2, 7], None)
    np.testing.assert_array_equal(logits, kept)


@pytest.mark.parametrize("tokens", [[], [-1], [256], [0, 10**6]])
def test_tokens_outside_the_vocabulary_are_refused(opened: Opened, tokens: list[int]) -> None:
    with pytest.raises(TokenError):
        opened.session.forward(tokens, None)


def test_none_starts_afresh_every_time(opened: Opened) -> None:
    first, state = opened.session.forward(TOKENS, None)
    opened.session.forward(TOKENS, state)
    np.testing.assert_array_equal(opened.session.forward(TOKENS, None)[0], first)


def test_scoring_gives_every_position(opened: Opened, model: Model) -> None:
    if not isinstance(opened.session, Scoring):
        pytest.skip("not Scoring")
    logits = opened.session.logits(TOKENS, None)
    assert logits.shape == (len(TOKENS), model.config.n_vocab)
    assert logits.dtype == np.float32


def test_trace_points_are_named_as_documented(opened: Opened, model: Model) -> None:
    if not isinstance(opened.session, Traceable):
        pytest.skip("not Traceable")
    wanted: list[str] = []
    forward(model.weights, TOKENS, tap=lambda name, array: wanted.append(name))
    seen: list[str] = []

    def tap(name: str, array: np.ndarray) -> None:
        seen.append(name)
        assert array.dtype == np.float32, name
        assert array.shape[0] == len(TOKENS), name
        assert array.ndim == 2, name

    logits, _ = opened.session.trace(TOKENS, None, tap)
    assert logits.shape == (model.config.n_vocab,)
    assert seen == [name for name in wanted if name in seen], "unknown name or wrong order"
    assert seen


def test_a_canonical_state_goes_in_and_comes_out(opened: Opened, model: Model) -> None:
    session = opened.session
    if not isinstance(session, StateAccess):
        pytest.skip("not StateAccess")
    logits, state = session.forward(TOKENS, None)
    exported = session.export_state(state)
    assert exported.shape == (model.config.n_layer, 5, model.config.n_embd)
    assert exported.dtype == np.float32
    np.testing.assert_array_equal(session.export_state(session.import_state(exported)), exported)
    fresh, _ = session.forward(TOKENS, session.import_state(initial_state(model.config)))
    np.testing.assert_allclose(fresh, logits, rtol=1e-3, atol=1e-3)


def test_an_exported_state_is_a_copy(opened: Opened) -> None:
    session = opened.session
    if not isinstance(session, StateAccess):
        pytest.skip("not StateAccess")
    _, state = session.forward(TOKENS, None)
    before, _ = session.forward([8], state)
    session.export_state(state)[...] = np.nan
    imported = np.zeros_like(session.export_state(state))
    taken = session.import_state(imported)
    imported[...] = np.nan
    np.testing.assert_array_equal(session.forward([8], state)[0], before)
    assert np.isfinite(session.export_state(taken)).all()


def test_greedy_is_the_arg_max_of_forward(opened: Opened) -> None:
    session = opened.session
    if not isinstance(session, Generating):
        pytest.skip("not Generating")
    _, state = session.forward(TOKENS, None)
    ids, end = session.greedy(8, state, 6)
    assert len(ids) == 6
    token, chosen = 8, []
    for _ in range(6):
        logits, state = session.forward([token], state)
        token = int(logits.argmax())
        chosen.append(token)
    assert [int(i) for i in ids] == chosen
    np.testing.assert_array_equal(session.forward([1], end)[0], session.forward([1], state)[0])


# Opening.


def test_a_scheme_the_backend_lacks_is_unsupported_with_those_it_has() -> None:
    with (
        pytest.raises(Unsupported, match=r"torch has no scheme Q4_0; it has fp32"),
        open_session("torch", "tiny", "Q4_0"),
    ):
        pass


def test_a_device_the_backend_lacks_is_unsupported_with_those_it_has() -> None:
    with pytest.raises(Unsupported, match=r"numpy does not run on cuda"), open_session("numpy", "tiny", device="cuda"):
        pass


def test_an_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(UnknownBackend, match=re.escape("did you mean 'numpy'?")):
        load_backend("nunpy")


def test_a_scheme_that_does_not_fit_the_model_names_the_tensor() -> None:
    odd = synthetic(Config(1, 40, 160, 30))
    assert tensor_shapes(odd.config)["blocks.0.att.key.weight"] == (40, 40)
    with pytest.raises(ConfigError, match="40"), open_session("numpy", odd, "Q4_0") as opened:
        opened.session.forward([1], None)
