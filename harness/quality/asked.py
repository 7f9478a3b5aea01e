"""On what quality is measured, with which cells, and about how long that takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from backends.index import load_backend
from harness.estimate import probe
from harness.models import model_config
from harness.plan import Cell, Plan, Request, match_schemes, plan
from harness.without_codec import has_codec
from reference.config import count_parameters
from reference.errors import InputError
from reference.schemes import SCHEME_CLASSES

#: Tokens of a LAMBADA passage, about.
_LAMBADA_TOKENS = 90

#: The reference's loop over tokens, a layer; comparing two distributions, an id of the vocabulary: seconds, about.
_LOOP_SECONDS, _COMPARING_SECONDS = 5e-5, 5e-8


@dataclass(frozen=True)
class Asked:
    """On what quality is measured.

    text, data  files; ``None``: the held-out text, and LAMBADA where it lies beside the checkpoint
    documents   how many passages of LAMBADA
    against     backend and scheme of the cell that the others' divergence is compared with
    no_worse    a cell that is worse than it fails; ``strict``: one that is not shown to be no worse, too
    """

    text: str | None = None
    tokens: int = 4096
    context: int = 128
    data: str | None = None
    documents: int = 500
    tokenizer: str | None = None
    against: tuple[str, str] | None = None
    no_worse: bool = False
    strict: bool = False

    def names(self, cell: Cell) -> bool:
        """Whether a cell is what the others are compared with, wherever it runs."""
        return (cell.backend, cell.scheme) == self.against


def planned(request: Request, asked: Asked) -> Plan:
    """The cells asked for; of every model, the one that the others are compared with comes first.

    Raises InputError, with the nearest right one, for a wrong name of any kind.
    """
    found = plan(request)
    if asked.against is None:
        return found
    backend, scheme = asked.against
    if scheme not in load_backend(backend).INFO.schemes and scheme in SCHEME_CLASSES:
        known = ", ".join(match_schemes((scheme,), load_backend(backend).INFO)[0])
        which = f"name one of {backend}'s: {known}" if known else f"{backend} has none of it"
        raise InputError(f"--against {backend}:{scheme}: {scheme} is a class of schemes; {which}")
    named = plan(replace(request, backends=(backend,), schemes=(scheme,)))
    firsts = {cell.model: cell for cell in reversed(named.cells)}
    cells: list[Cell] = []
    for model in dict.fromkeys([*(cell.model for cell in found.cells), *firsts]):
        rest = [cell for cell in found.cells if cell.model == model]
        first = firsts.get(model)
        cells += rest if first is None else [first, *(cell for cell in rest if cell != first)]
    refused = [*found.refused, *(refusal for refusal in named.refused if refusal not in found.refused)]
    return replace(found, cells=tuple(cells), refused=tuple(refused))


def seconds(cells: Plan, asked: Asked) -> Callable[[Cell], float]:
    """Predicted time of a cell beyond its gate: the reference in float64, the system in single steps, comparing.

    The reference runs on the fp32 weights for the first cell of a model, and on what every scheme stores.
    """
    rate, bandwidth = probe()
    firsts = {cell.model: cell for cell in reversed(cells.cells)}

    def of(cell: Cell) -> float:
        config = model_config(cell.model)
        read = count_parameters(config) - config.n_vocab * config.n_embd
        stored = has_codec(cell.scheme) and cell.scheme != "fp32"
        passes = (firsts[cell.model] == cell) + stored
        exact = passes * (2.0 * read / (rate / 2) + config.n_layer * _LOOP_SECONDS)
        compared = (1 + 2 * stored) * config.n_vocab * _COMPARING_SECONDS
        positions = asked.tokens + (_LAMBADA_TOKENS * asked.documents if asked.data else 0)
        return asked.tokens * (exact + compared) + positions * 4.0 * read / bandwidth

    return of
