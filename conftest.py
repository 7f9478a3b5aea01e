"""Options of the suites, and the cells they run over.

``pytest suites/parity --backend torch --quant fp16 --model 169m`` judges exactly those cells; without
options every backend that needs no environment of its own, with its usual schemes, on the embedded model;
``--backend all`` takes in the others too. What was asked for by name
and is not to be had fails; what ``all`` leaves out is skipped with its reason. A backend with an
environment of its own runs there; ``--isolate`` gives every cell a process of its own.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import lru_cache

import pytest
from threadpoolctl import threadpool_limits

from backends.api import Unavailable, Unsupported
from backends.index import backend_names
from harness import cuda_order
from harness.measure import Workload
from harness.models import Model, gate_tokens, open_model
from harness.plan import ALL, Cell, Plan, Request, plan
from harness.run import GATE_TOKENS
from harness.session import Opened, needs_isolation, open_session
from harness.tolerance import Truth
from harness.without_codec import truth_for
from reference.errors import InputError
from reference.weights import Weights
from suites.skips import folded, reason_of

#: What ``--backend`` means without being given.
HERE = "here"


def pytest_configure() -> None:
    """Before a suite imports a runtime: the cards are numbered as the driver's tools list them."""
    cuda_order.settle()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("rwkv-bench", "which cells the suites run over (comma lists or `all`)")
    group.addoption(
        "--backend", default=HERE, help="backend names or paths of .py files; all; default: those of this environment"
    )
    group.addoption("--quant", default=ALL, help="schemes, or classes such as int4")
    group.addoption("--device", default=ALL, help="cpu, cuda, mps")
    group.addoption("--model", default="tiny", help="tiny, a preset or a checkpoint path")
    group.addoption("--isolate", action="store_true", default=None, help="run each cell in a process of its own")
    group.addoption("--in-process", dest="isolate", action="store_false", help="run every cell in this process")
    group.addoption("--slow", action="store_true", help="run the tests that take long as well (marked slow)")
    group.addoption("--threads", type=_threads, default=None, help="CPU threads (default: 1, to time: all)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked slow, unless it is asked for."""
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in set(slow)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Why tests were skipped, in a few lines where pytest has one for every test."""
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped:
        terminalreporter.section(f"{len(skipped)} skipped, by reason", sep="-")
        for line in folded(reason_of(report.longrepr) for report in skipped):
            terminalreporter.line(line)


def _threads(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise pytest.UsageError(f"--threads {text}: a whole number of at least 1 is needed")
    return int(text)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "cell" in metafunc.fixturenames:
        planned = _planned(metafunc.config, getattr(metafunc.module, "DEFAULT_THREADS", 1))
        cells = [
            pytest.param(cell, id=f"{cell.backend}-{cell.scheme}-{cell.hardware.device}") for cell in planned.cells
        ]
        cells += [
            pytest.param(None, id=f"{refusal.backend}-{refusal.scheme}", marks=pytest.mark.skip(refusal.reason))
            for refusal in planned.refused
            if refusal.verdict == "UNAVAILABLE"
        ]
        metafunc.parametrize("cell", cells, scope="module")


def _planned(config: pytest.Config, default_threads: int | None) -> Plan:
    """Cells of the options; a wrong name is a usage error of pytest, not a failing test."""
    names = {name: tuple(config.getoption(f"--{name}").split(",")) for name in ("backend", "quant", "device")}
    default = names["backend"] == (HERE,)
    if default:
        names["backend"] = tuple(name for name in backend_names() if not needs_isolation(name))
    request = Request(
        models=(config.getoption("--model"),),
        backends=names["backend"],
        schemes=names["quant"],
        devices=names["device"],
        threads=config.getoption("--threads") or default_threads,
        workload=Workload(256, 32),
        isolate=config.getoption("--isolate"),
    )
    try:
        planned = plan(request)
        _model(request.models[0])
    except InputError as error:
        raise pytest.UsageError(str(error)) from None
    refused = [refusal.reason for refusal in planned.refused if refusal.by_name and not default]
    if refused:
        raise pytest.UsageError("; ".join(refused))
    return planned


@pytest.fixture(scope="session", autouse=True)
def _one_blas_thread() -> Iterator[None]:
    """Small matrix products on two threads wait for each other whenever anything else runs."""
    with threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture(scope="session", autouse=True)
def _what_was_frozen_ends_with_the_run() -> Iterator[None]:
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_not_walked(_what_was_frozen_ends_with_the_run: None) -> None:
    """What lives on between two files is libraries and pytest; the harness's own collections need not walk it."""
    gc.collect()
    gc.freeze()


@lru_cache(maxsize=1)
def _model(name: str) -> Model:
    return open_model(name)


@pytest.fixture(scope="session")
def model(pytestconfig: pytest.Config) -> Model:
    """The model of ``--model``."""
    return _model(pytestconfig.getoption("--model"))


#: Opens another session of a cell: its weights, and its threads where they are not the cell's.
Reopen = Callable[..., AbstractContextManager[Opened]]


@pytest.fixture(scope="module")
def reopen(cell: Cell, pytestconfig: pytest.Config) -> Reopen:
    """``reopen(weights, threads=None)``: a session like the cell's, in a process of its own if that is in one."""

    def run(weights: Model | Weights, threads: int | None = None) -> AbstractContextManager[Opened]:
        where, isolate = cell.hardware.device, pytestconfig.getoption("--isolate")
        return open_session(cell.backend, weights, cell.scheme, where, threads or cell.threads, isolate)

    return run


@pytest.fixture(scope="module")
def opened(cell: Cell, model: Model, reopen: Reopen, pytestconfig: pytest.Config) -> Iterator[Opened]:
    """A loaded session of the cell."""
    try:
        with reopen(model) as session:
            yield session
    except (Unavailable, Unsupported) as error:
        if any(pytestconfig.getoption(f"--{name}") not in (ALL, HERE) for name in ("backend", "quant", "device")):
            pytest.fail(f"{cell}: {error}", pytrace=False)
        pytest.skip(f"{cell}: {error}")


@pytest.fixture(scope="module")
def truth(cell: Cell, model: Model, opened: Opened) -> Truth:
    """What the cell's session is compared with, over the gate's prompt."""
    tokens = gate_tokens(model, GATE_TOKENS)
    return truth_for(opened.session, model.weights, cell.scheme, opened.arithmetic, tokens, model.sha256)
