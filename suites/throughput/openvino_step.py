"""One decode step of RWKV-4 as an OpenVINO model, int4 or int8 weights of the onnx backend's codec; and its clock.

Runs in an interpreter with openvino and numpy, started by :mod:`suites.throughput.compare_openvino`:

    python openvino_step.py ROOT CHECKPOINT SCHEME THREADS

Prints one JSON line once it is loaded (with the logits of CHECK as a proof), then one for every line it reads: the
microseconds of so many steps.
"""

from __future__ import annotations

import json
import sys
import time
from importlib import import_module
from typing import Any

import numpy as np

#: Token ids whose last logits are sent back.
CHECK = (1, 2, 3)


class Step:
    """The graph under construction; arrays are (1, C), the state is (5 L, C) as the reference has it."""

    def __init__(self, weights: Any, scheme: Any) -> None:
        self._weights, self._scheme = weights, scheme
        self._ov, self._op = import_module("openvino"), import_module("openvino.opset13")

    def model(self) -> Any:
        op, config = self._op, self._weights.config
        token = op.parameter([1], np.int64, name="token")
        state = op.parameter([5 * config.n_layer, config.n_embd], np.float32, name="state")
        rows = op.split(state, 0, 5 * config.n_layer).outputs()
        x = op.gather(self._constant(self._weights["emb.weight"].rows(slice(None), np.float16)), token, 0)
        x = self._norm(op.convert(x, "f32"), "blocks.0.ln0")
        new: list[Any] = []
        for i in range(config.n_layer):
            ffn_x, att_x, *sums = rows[5 * i : 5 * i + 5]
            h = self._norm(x, f"blocks.{i}.ln1")
            out, sums = self._time_mix(h, att_x, sums, f"blocks.{i}.att.")
            x = op.add(x, out)
            g = self._norm(x, f"blocks.{i}.ln2")
            x = op.add(x, self._channel_mix(g, ffn_x, f"blocks.{i}.ffn."))
            new += [g, h, *sums]
        logits = self._linear(self._norm(x, "ln_out"), "head.weight")
        return self._ov.Model([op.result(logits), op.result(op.concat(new, 0))], [token, state], "rwkv4")

    def _time_mix(self, h: Any, past: Any, sums: Any, at: str) -> tuple[Any, list[Any]]:
        op, (aa, bb, pp) = self._op, sums
        k, v, r = (
            self._linear(self._mix(h, past, f"{at}time_mix_{gate}"), f"{at}{name}.weight")
            for gate, name in (("k", "key"), ("v", "value"), ("r", "receptance"))
        )
        now = op.add(k, self._vector(at + "time_first"))
        top = op.maximum(pp, now)
        e1, e2 = op.exp(op.subtract(pp, top)), op.exp(op.subtract(now, top))
        wkv = op.divide(op.add(op.multiply(e1, aa), op.multiply(e2, v)), op.add(op.multiply(e1, bb), e2))
        faded = op.subtract(pp, self._constant(np.exp(self._array(at + "time_decay"))[None]))
        top = op.maximum(faded, k)
        e1, e2 = op.exp(op.subtract(faded, top)), op.exp(op.subtract(k, top))
        aa = op.add(op.multiply(e1, aa), op.multiply(e2, v))
        bb = op.add(op.multiply(e1, bb), e2)
        return self._linear(op.multiply(op.sigmoid(r), wkv), at + "output.weight"), [aa, bb, top]

    def _channel_mix(self, h: Any, past: Any, at: str) -> Any:
        op = self._op
        k = op.relu(self._linear(self._mix(h, past, at + "time_mix_k"), at + "key.weight"))
        r = op.sigmoid(self._linear(self._mix(h, past, at + "time_mix_r"), at + "receptance.weight"))
        return op.multiply(r, self._linear(op.multiply(k, k), at + "value.weight"))

    def _mix(self, h: Any, past: Any, name: str) -> Any:
        return self._op.add(past, self._op.multiply(self._op.subtract(h, past), self._vector(name)))

    def _norm(self, x: Any, at: str) -> Any:
        op = self._op
        x = op.mvn(x, np.array([1], np.int64), True, 1e-5, "inside_sqrt")
        return op.add(op.multiply(x, self._vector(at + ".weight")), self._vector(at + ".bias"))

    def _linear(self, x: Any, name: str) -> Any:
        """``x (1, K)`` times ``(N, K)`` transposed: codes, zero points and scales, which the plugin keeps packed."""
        op, ov = self._op, self._ov
        w = self._array(name)
        blocks = self._scheme.blocks(name)
        packed, groups = blocks.quantize(w), w.shape[1] // blocks.group
        shape, kind = [w.shape[0], groups, blocks.group], ov.Type.u4 if blocks.bits == 4 else ov.Type.u8
        codes = op.convert(self._packed(packed.codes, shape, kind), "f32")
        if packed.zeros is not None and groups % 2 == 0:
            zero = op.convert(self._packed(packed.zeros, [w.shape[0], groups, 1], kind), "f32")
        else:
            assert packed.zeros is None, "rows of zero points end within a byte"
            zero = op.convert(self._constant(np.full((1, 1, 1), 1 << (blocks.bits - 1), np.uint8)), "f32")
        real = op.multiply(op.subtract(codes, zero), self._constant(packed.scales[..., None]))
        return op.matmul(x, op.reshape(real, np.array(w.shape, np.int64), False), False, True)

    def _packed(self, data: np.ndarray, shape: list[int], kind: Any) -> Any:
        tensor = self._ov.Tensor(kind, self._ov.Shape(shape))
        np.asarray(tensor.data).reshape(-1).view(np.uint8)[:] = data.reshape(-1)
        return self._op.constant(tensor)

    def _constant(self, array: np.ndarray) -> Any:
        return self._op.constant(np.ascontiguousarray(array))

    def _vector(self, name: str) -> Any:
        return self._constant(self._array(name).reshape(1, -1))

    def _array(self, name: str) -> np.ndarray:
        return np.asarray(self._weights[name].rows(slice(None), np.float32))


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Serve one scheme."""
    root, path, scheme, threads = sys.argv[1:]
    sys.path.insert(0, root)
    from reference import initial_state, load_checkpoint
    from reference.codecs_onnx import ONNX_SCHEMES

    ov = import_module("openvino")
    weights, kept = load_checkpoint(path), ONNX_SCHEMES[scheme]
    # Activations become int8 in groups, as MatMulNBits has them at accuracy_level 4; float32 elsewhere.
    properties = {
        "INFERENCE_NUM_THREADS": int(threads),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": kept.matrices.group,
    }
    request = ov.Core().compile_model(Step(weights, kept).model(), "CPU", properties).create_infer_request()
    state = initial_state(weights.config).reshape(-1, weights.config.n_embd)
    token = np.zeros(1, np.int64)

    def step(state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        logits, state = request.infer([token, state], share_inputs=True, share_outputs=True).values()
        return logits, state.copy()

    logits = np.empty(0)
    for token[0] in CHECK:
        logits, state = step(state)
    _say({"version": ov.__version__, "logits": logits.ravel().tolist()})
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            began = time.perf_counter_ns()
            logits, state = step(state)
            token[0] = logits.argmax()
            times.append((time.perf_counter_ns() - began) / 1e3)
        _say(times)


if __name__ == "__main__":
    main()
