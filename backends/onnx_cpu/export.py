"""From weights to the two files that a session opens: ``model.onnx``, and ``weights.bin`` beside it."""

from __future__ import annotations

from pathlib import Path

from backends.onnx_cpu.graph import Network, write_weights
from backends.onnx_cpu.graph_file import WeightFile
from backends.onnx_cpu.schemes import SCHEMES
from reference.converted import derived
from reference.weights import Weights

MODEL, WEIGHTS = "model.onnx", "weights.bin"

#: Raise it when the same weights are exported into other files.
_EXPORT = 3


def exported(checkpoint: Weights, scheme: str) -> Path:
    """Folder of the graph over ``checkpoint``, in the cache."""
    # Both ways to compute share what is kept, but not the operator's attribute: 100 kB of graph over the same bytes.
    return derived(checkpoint, f"onnx-{scheme}-{_EXPORT}", lambda folder: write(checkpoint, scheme, folder))


def write(checkpoint: Weights, scheme: str, folder: Path) -> None:
    """Write the graph and its weights into ``folder``, which is made; what it has already is overwritten."""
    kept = SCHEMES[scheme]
    folder.mkdir(parents=True, exist_ok=True)
    file = WeightFile(folder / WEIGHTS)
    write_weights(checkpoint, kept, file)
    file.close()
    Network(checkpoint, kept, file).save(folder / MODEL)
