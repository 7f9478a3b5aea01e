"""CUDA graphs: work on fixed addresses, recorded once and replayed as one launch.

All that only a GPU can show is in this file; everywhere else a graph is a function without arguments.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

Work = Callable[[], None]


def captured(work: Work, device: torch.device) -> Work:
    """A function that does what ``work`` does; on the CPU ``work`` itself.

    ``work`` runs once before it is recorded, which compiles its kernels; nothing is computed while it is recorded.
    """
    if device.type == "cpu":
        return work
    apart = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    apart.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(apart):
        work()
    torch.cuda.current_stream(device).wait_stream(apart)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=apart):
        work()
    return graph.replay
