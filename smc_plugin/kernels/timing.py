"""Times work as a CUDA graph, launch gaps included."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def graph_times_us(calls: Sequence[Callable[[], object]], replays: int, warm_up: int = 2) -> list[float]:
    """Capture all calls as one graph and time its replays.

    Args:
        calls: enqueue work on the current stream; the first two run once before the capture, which compiles kernels.
        replays: timed ones, after `warm_up` others.
    Returns:
        microseconds of each timed replay, all calls together.
    """
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Threads of NCCL look at their events meanwhile, which must not end the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for call in calls:
            call()
    times = []
    for _ in range(warm_up + replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000)
    return times[warm_up:]
