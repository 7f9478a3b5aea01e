"""Every trace point of a step: what its kernels put out, and beside it what they keep to themselves.

The kernels of a step finish a product before they store it: ``att.out`` is added to the stream, ``ffn.k``
squared, ``ffn.v`` gated. Those are computed once more, in float32, from the same inputs; the path to the logits
is the kernels of ``prefill`` or ``decode`` and nothing else, so its logits and state are theirs to the last bit.
"""

from __future__ import annotations

from typing import Any

from backends.tvm_mlc.graph import Step
from backends.tvm_mlc.points import trace_points


def traced(step: Step, rows: Any, n: Any) -> list[Any]:
    """The points of a step that has run, in the order of :func:`backends.tvm_mlc.points.trace_points`."""
    config = step.graph.config
    step.rows, step.n = rows, n  # the head of a prompt's step has left them at one
    points = dict(step.seen)
    for i in range(config.n_layer):
        points.update(_beside(step, f"blocks.{i}."))
    return [points[name] for name in trace_points(config.n_layer)]


def _beside(step: Step, block: str) -> dict[str, Any]:
    from tvm import relax

    emit, seen = step.graph.builder.emit, step.seen
    c, f = step.graph.config.n_embd, step.graph.config.n_ffn
    att, ffn = block + "att.", block + "ffn."

    def gate(at: str) -> Any:
        return emit(relax.op.sigmoid(emit(relax.op.astype(seen[at + "receptance"], "float32"))))

    r, v = gate(ffn), step.product(seen[ffn + "k2"], ffn + "value.weight", c, f, out="float32")
    return {
        att + "r": gate(att),
        att + "out": step.product(seen[att + "rwkv"], att + "output.weight", c, c, out="float32"),
        ffn + "k": step.product(seen[ffn + "xk"], ffn + "key.weight", f, c, out="float32"),
        ffn + "r": r,
        ffn + "v": v,
        ffn + "out": emit(relax.op.multiply(r, v)),
    }
