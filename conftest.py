"""Options of the suites, and the cells they run over.

``pytest suites/parity --backend torch --quant fp16 --model 169m`` judges exactly those cells; without
options every backend and scheme that is usable here, on the embedded model. What was asked for by name
and is not to be had fails; what ``all`` leaves out is skipped with its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest
from threadpoolctl import threadpool_limits

from backends.api import Unavailable, Unsupported
from harness.measure import Workload
from harness.models import Model, gate_tokens, open_model
from harness.plan import ALL, Cell, Request, plan
from harness.run import GATE_TOKENS
from harness.session import Opened, open_session
from harness.tolerance import Truth, derive
from reference.errors import InputError


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rwkv-bench", "which cells the suites run over (comma lists or `all`)")
    group.addoption("--backend", default=ALL, help="backend names or paths of .py files")
    group.addoption("--quant", default=ALL, help="schemes, or classes such as int4")
    group.addoption("--device", default=ALL, help="cpu, cuda, mps")
    group.addoption("--model", default="tiny", help="tiny, a preset or a checkpoint path")
    group.addoption("--threads", type=_threads, default=None, help="CPU threads (default: 1, to time: all)")


def _threads(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise pytest.UsageError(f"--threads {text}: a whole number of at least 1 is needed")
    return int(text)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        cells = _cells(metafunc.config, getattr(metafunc.module, "DEFAULT_THREADS", 1))
        ids = [f"{cell.backend}-{cell.scheme}-{cell.hardware.device}" for cell in cells]
        metafunc.parametrize("cell", cells, ids=ids, scope="module")


def _cells(config: pytest.Config, default_threads: int | None) -> tuple[Cell, ...]:
    """Cells of the options; a wrong name is a usage error of pytest, not a failing test."""
    names = {name: tuple(config.getoption(f"--{name}").split(",")) for name in ("backend", "quant", "device")}
    request = Request(
        models=(config.getoption("--model"),),
        backends=names["backend"],
        schemes=names["quant"],
        devices=names["device"],
        threads=config.getoption("--threads") or default_threads,
        workload=Workload(256, 32),
    )
    try:
        planned = plan(request)
        _model(request.models[0])
    except InputError as error:
        raise pytest.UsageError(str(error)) from None
    refused = [refusal.reason for refusal in planned.refused if refusal.by_name]
    if refused:
        raise pytest.UsageError("; ".join(refused))
    return planned.cells


@pytest.fixture(scope="session", autouse=True)
def _one_blas_thread() -> Iterator[None]:
    """Small matrix products on two threads wait for each other whenever anything else runs."""
    with threadpool_limits(1, user_api="blas"):
        yield


@lru_cache(maxsize=1)
def _model(name: str) -> Model:
    return open_model(name)


@pytest.fixture(scope="session")
def model(pytestconfig: pytest.Config) -> Model:
    """The model of ``--model``."""
    return _model(pytestconfig.getoption("--model"))


@pytest.fixture(scope="module")
def opened(cell: Cell, model: Model, pytestconfig: pytest.Config) -> Iterator[Opened]:
    """A loaded session of the cell."""
    try:
        with open_session(cell.backend, model, cell.scheme, cell.hardware.device, cell.threads) as session:
            yield session
    except (Unavailable, Unsupported) as error:
        if any(pytestconfig.getoption(f"--{name}") != ALL for name in ("backend", "quant", "device")):
            pytest.fail(f"{cell}: {error}", pytrace=False)
        pytest.skip(f"{cell}: {error}")


@pytest.fixture(scope="module")
def truth(cell: Cell, model: Model, opened: Opened) -> Truth:
    """What the cell's session is compared with, over the gate's prompt."""
    return derive(model.weights, cell.scheme, opened.arithmetic, gate_tokens(model, GATE_TOKENS), model.sha256)
