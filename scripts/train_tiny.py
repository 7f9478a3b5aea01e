"""Train the embedded byte-level RWKV-4 and write it with its held-out text.

The corpus is the reStructuredText source of the Python documentation, as installed by
Debian's package ``python3.11-doc``:

    python scripts/train_tiny.py --corpus /usr/share/doc/python3.11/html/_sources
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import tiny_model
import torch
from tiny_model import N_LAYER, VOCAB, State, wkv
from torch import Tensor
from torch.nn import functional

OUT = Path(__file__).resolve().parent.parent / "reference" / "embedded"
BATCH = 16
WINDOW = 256
WARM_UP = 100
RATE = 2e-3
LAST_RATE = 2e-5
CLIP = 1.0
RESET = 1 / 16
HELD_OUT_BYTES = 150_000
HELD_OUT_SIZES = range(4_000, 40_000)
HELD_OUT_PROSE = 0.4
LOG_EVERY = 100


def read_corpus(folder: Path) -> dict[str, bytes]:
    """Return every document of the corpus, ordered by its name."""
    paths = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*.rst.txt")}
    if not paths:
        raise SystemExit(f"no *.rst.txt under {folder}")
    return {name: paths[name].read_bytes() for name in sorted(paths)}


def prose_share(text: bytes) -> float:
    """Return the share of the bytes that stand on unindented lines starting with a letter."""
    lines = text.splitlines()
    return sum(len(x) for x in lines if x[:1].isalpha()) / max(1, sum(map(len, lines)))


def held_out_names(documents: dict[str, bytes]) -> list[str]:
    """Choose whole prose-heavy documents of middling size, in the order of a hash."""
    names = [n for n, text in documents.items() if len(text) in HELD_OUT_SIZES and prose_share(text) >= HELD_OUT_PROSE]
    names.sort(key=lambda n: hashlib.sha256(n.encode()).digest())
    chosen: list[str] = []
    for name in names:
        if sum(len(documents[n]) for n in chosen) >= HELD_OUT_BYTES:
            break
        chosen.append(name)
    return sorted(chosen)


def streams(documents: list[bytes], seed: int, epoch: int) -> Tensor:
    """Return the shuffled documents of one epoch as ``BATCH`` parallel streams."""
    order = np.random.default_rng([seed, epoch]).permutation(len(documents))
    text = np.frombuffer(b"".join(documents[i] for i in order), dtype=np.uint8)
    length = len(text) // BATCH
    return torch.from_numpy(text[: length * BATCH].reshape(BATCH, length).T.astype(np.int64))


def windows(documents: list[bytes], seed: int, step: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the inputs and targets of every step from ``step`` on."""
    per_epoch = (sum(map(len, documents)) // BATCH - 1) // WINDOW
    epoch, window = divmod(step, per_epoch)
    while True:
        data = streams(documents, seed, epoch)
        for i in range(window, per_epoch):
            part = data[i * WINDOW : (i + 1) * WINDOW + 1]
            yield part[:-1], part[1:]
        epoch, window = epoch + 1, 0


def rate(step: int, steps: int) -> float:
    """Return the learning rate: a linear warm-up, then a cosine decay."""
    if step < WARM_UP:
        return RATE * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return LAST_RATE + (RATE - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def bits_per_byte(params: dict[str, Tensor], text: bytes) -> float:
    """Return the mean code length of ``text`` after its first byte, with carried state."""
    tokens = torch.tensor(list(text))[:, None]
    state = [State.zeros(1) for _ in range(N_LAYER)]
    total = 0.0
    for start in range(0, len(text) - 1, 1024):
        part = tokens[start : start + 1025]
        logits, state = tiny_model.forward(params, part[:-1], state)
        total += functional.cross_entropy(logits[:, 0], part[1:, 0], reduction="sum").item()
    return total / math.log(2) / (len(text) - 1)


def check_gradient() -> None:
    """Compare the hand-written gradient of the recurrence with finite differences."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    inputs = [draw(3).exp(), draw(3), 3 * draw(7, 2, 3), draw(7, 2, 3)]
    state = [draw(2, 3), 1 + draw(2, 3).abs(), draw(2, 3)]
    for x in inputs:
        x.requires_grad_()
    torch.autograd.gradcheck(lambda *x: wkv(*x, *state)[0], inputs)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.replace(path)


def export(params: dict[str, Tensor], path: Path, held_out: bytes, notes: dict[str, str]) -> None:
    """Write the parameters as fp16 with their provenance."""
    half = {n: p.detach().half().contiguous() for n, p in params.items()}
    bits = bits_per_byte({n: p.float() for n, p in half.items()}, held_out)
    metadata = {**notes, "held_out_bits_per_byte": f"{bits:.4f}"}
    write_atomically(path, safetensors.torch.save(half, metadata))
    print(f"{path.name}: {bits:.4f} bits per byte held out", flush=True)


def train(args: argparse.Namespace, documents: list[bytes]) -> dict[str, Tensor]:
    """Train from scratch, or from the checkpoint, and return the parameters."""
    torch.manual_seed(args.seed)
    params = {n: p.requires_grad_() for n, p in tiny_model.init_params().items()}
    optimizer = torch.optim.Adam(params.values(), lr=RATE, betas=(0.9, 0.99), fused=True)
    state = [State.zeros(BATCH) for _ in range(N_LAYER)]
    step, seconds, mean = 0, 0.0, 0.0
    if args.resume:
        saved: dict[str, Any] = torch.load(args.checkpoint, weights_only=False)
        for name, p in params.items():
            p.data.copy_(saved["params"][name])
        optimizer.load_state_dict(saved["optimizer"])
        state, step, seconds = saved["state"], saved["step"], saved["seconds"]

    started = time.monotonic() - seconds
    for inputs, targets in windows(documents, args.seed, step):
        if step == args.steps:
            break
        keep = np.random.default_rng([args.seed, 1 << 32, step]).random(BATCH) >= RESET
        state = [s.drop(torch.from_numpy(keep)) for s in state]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, state = tiny_model.forward(params, inputs, state)
        loss = functional.cross_entropy(logits.float().reshape(-1, VOCAB), targets.reshape(-1))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(params.values(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps)
        optimizer.step()

        step += 1
        mean += loss.item() / math.log(2) / LOG_EVERY
        if step % LOG_EVERY == 0:
            seconds = time.monotonic() - started
            print(f"step {step} bits {mean:.4f} seconds {seconds:.0f}", flush=True)
            mean = 0.0
            if args.checkpoint:
                part = args.checkpoint.with_name(args.checkpoint.name + ".part")
                names = ("params", "optimizer", "state", "step", "seconds")
                values = (params, optimizer.state_dict(), state, step, seconds)
                torch.save(dict(zip(names, values, strict=True)), part)
                part.replace(args.checkpoint)
    return params


def main() -> None:
    """Parse the command line, train, and write the model and the held-out text."""
    parser = argparse.ArgumentParser(description="Train the embedded byte-level RWKV-4.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.rst.txt")
    parser.add_argument("--out", type=Path, default=OUT, help="folder to write to")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--seed", type=int, default=4)
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--checkpoint", type=Path, help="file to save the progress in")
    parser.add_argument("--resume", action="store_true", help="go on from --checkpoint")
    args = parser.parse_args()
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint")
    torch.set_num_threads(args.threads)
    check_gradient()

    documents = read_corpus(args.corpus)
    names = held_out_names(documents)
    held_out = b"".join(documents[n] for n in names)
    print("held out:", len(held_out), "bytes:", *names, flush=True)
    write_atomically(args.out / "heldout.txt", held_out)
    notes = {
        "format": "pt",
        "architecture": "RWKV-4, byte level, BlinkDL tensor names",
        "corpus": "Python 3.11 documentation sources (Debian package python3.11-doc)",
        "corpus_sha256": hashlib.sha256(b"".join(documents.values())).hexdigest(),
        "held_out_documents": " ".join(names),
        "held_out_sha256": hashlib.sha256(held_out).hexdigest(),
        "steps": str(args.steps),
        "bytes_per_step": str(BATCH * WINDOW),
        "seed": str(args.seed),
        "torch": torch.__version__,
    }
    params = train(args, [text for n, text in documents.items() if n not in names])
    export(params, args.out / "tiny.safetensors", held_out, notes)


if __name__ == "__main__":
    main()
