"""Clock: how long work takes on a device, cold and without Python's own time, as a median."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

Work = Callable[[], object]

FLUSH = 256 << 20  # bytes that are read between repetitions: five times the L2 of an H100
FEWEST, MOST = 20, 400  # repetitions
ENOUGH = 1 << 30  # bytes that are copied to learn the copy rate


def nothing() -> None:
    """Work that takes no time."""


class Measured(NamedTuple):
    """What a clock tells."""

    microseconds: float  # the median
    captured: bool  # ran as a CUDA graph
    repeats: int


class Clock:
    """Measures work on one device for about `seconds` each.

    On a GPU the work is captured in a CUDA graph (plainly launched where that fails), the L2 is
    flushed between repetitions, and CUDA events tell the time. Elsewhere it is `perf_counter`.
    """

    def __init__(self, device: torch.device, seconds: float = 0.05) -> None:
        self.device, self._seconds = device, seconds
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            self._flush = torch.ones(FLUSH // 4, dtype=torch.int32, device=device)

    def measure(self, work: Work, before: Work = nothing, capture: bool = True) -> Measured:
        """Times `work`; `before` runs untimed ahead of every repetition."""
        if not self._on_gpu:
            work()
            return self._repeated(_plain, work, before, False)
        with torch.cuda.device(self.device):
            _warm(work, before)
            replay = captured(work) if capture else None
            return self._repeated(self._events, replay or work, before, replay is not None)

    def _repeated(
        self,
        spans: Callable[[Work, Work, int], list[float]],
        work: Work,
        before: Work,
        was_captured: bool,
    ) -> Measured:
        once = statistics.median(spans(work, before, 3))
        fewest = FEWEST if self._on_gpu else 1
        repeats = max(fewest, min(MOST, round(self._seconds * 1e6 / max(once, 1e-3))))
        took = statistics.median(spans(work, before, repeats))
        return Measured(took, was_captured, repeats)

    def _events(self, work: Work, before: Work, count: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in pairs:
            before()
            # the device is busy with this while Python launches what is timed; it is read, since
            # written lines would go back to memory in the timed part
            self._flush.max()
            start.record()
            work()
            end.record()
        torch.cuda.synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in pairs]


def _plain(work: Work, before: Work, count: int) -> list[float]:
    spans = []
    for _ in range(count):
        before()
        began = time.perf_counter()
        work()
        spans.append(1e6 * (time.perf_counter() - began))
    return spans


def _warm(work: Work, before: Work) -> None:
    """Compiles and allocates on a stream of its own, as graph capture wants it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            before()
            work()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def captured(work: Work) -> Work | None:
    """What replays `work` as a CUDA graph, or None when it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    return graph.replay


def copy_rate(clock: Clock, size: int = ENOUGH) -> float:
    """Bytes a second, read and written, of a device copy of `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=clock.device).random_(0, 256)
    target = torch.empty_like(source)
    # plainly launched: copies in a graph are slower
    took = clock.measure(lambda: target.copy_(source), capture=False).microseconds
    return 2 * size / took * 1e6


def device_name(device: torch.device) -> str:
    """What the device is called: NVIDIA H100 80GB HBM3."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()


def machine(device: torch.device) -> dict[str, str]:
    """Device and versions, for evidence."""
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = "none"
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }
