"""How much memory the reference needs above a memory-mapped checkpoint.

    python -m suites.throughput.memory_of_reference [--model 7b] [--stored f16] [--prompt-tokens 256]

Writes a checkpoint of the real shape and type as a sparse file of zeros (what is read and upcast, and
so the memory, does not depend on the values), runs one prompt, and prints the peak of anonymous memory
(``RssAnon``: all that is resident and not a page of the file) against the bar.
"""

from __future__ import annotations

import argparse
import json
import struct
import sys
import tempfile
import threading
import time
from pathlib import Path

from reference import forward, load_checkpoint, preset
from reference.config import Config, tensor_shapes

BAR_GIB = 2.5


def write_sparse(path: Path, config: Config, stored: str) -> None:
    """A safetensors file of zeros: the header is written, the data is a hole."""
    header: dict[str, object] = {}
    offset = 0
    for name, shape in tensor_shapes(config).items():
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": stored.upper(), "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


class PeakAnonymous(threading.Thread):
    """Samples ``RssAnon`` every 5 ms; ``peak`` in bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.005):
            self.peak = max(self.peak, anonymous_bytes())


def anonymous_bytes() -> int:
    """Resident memory of this process that belongs to no file. Linux only."""
    text = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in text.splitlines() if line.startswith("RssAnon"))) * 1024


def main() -> int:
    """Print the figures; status 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="7b")
    parser.add_argument("--stored", default="f16", choices=("f16", "bf16"))
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--folder", default=None, help="where the sparse file goes (default: temporary)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path = Path(folder) / "sparse.safetensors"
        write_sparse(path, preset(options.model), options.stored)
        before = anonymous_bytes()
        watch = PeakAnonymous()
        watch.start()
        start = time.perf_counter()
        weights = load_checkpoint(str(path), scan=False)
        forward(weights, list(range(options.prompt_tokens)))
        seconds = time.perf_counter() - start
        watch.done.set()
        watch.join()
    peak = (watch.peak - before) / 2**30
    print(
        f"{options.model} {options.stored}, {options.prompt_tokens} tokens in {seconds:.0f} s: "
        f"peak {peak:.2f} GiB above the mapped file of {weights.nbytes / 2**30:.1f} GiB (bar {BAR_GIB} GiB)"
    )
    return 0 if peak <= BAR_GIB else 1


if __name__ == "__main__":
    sys.exit(main())
