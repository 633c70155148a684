"""CUDA graphs: a function of tensors is recorded once, and replayed by a single call.

At size XS one update launches thousands of small kernels, and Python takes longer to launch them
than the GPU to run them. A recorded function runs at the GPU's own speed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from drama.errors import DramaError

Function: TypeAlias = Callable[..., Tensor]
"""Of tensors, to a tensor."""

CALLS_BEFORE = 3
"""Calls that run as they are, in which libraries choose their algorithms and take their memory."""


class RecordingFailed(DramaError):
    """A function could not be recorded."""


def recorder(device: torch.device, *, wanted: bool) -> Callable[[Function], Function]:
    """Return what makes a recording of a function; all share memory, so one may run at a time.

    Where that is not wanted, or the device is no GPU, it returns each function as it is.
    """
    if not wanted or device.type != "cuda":
        return lambda function: function
    pool = torch.cuda.graph_pool_handle()
    return lambda function: Recorded(function, device, pool)


class Recorded:
    """A function that is recorded at its fourth call and replayed from then on.

    The function must work on tensors of fixed sizes, ask nothing of the CPU, and keep what it
    changes (parameters, statistics, counters) in the same tensors. Random numbers come from the
    device's default generator, whose state moves on as if the function had run.

    Args:
        function: of tensors on one GPU, to a tensor there.
        device: that GPU.
        pool: memory that recordings share, what `torch.cuda.graph_pool_handle` returns; only one
            of them may run at a time.
    """

    def __init__(self, function: Function, device: torch.device, pool: Any) -> None:
        self.function, self.device, self.pool = function, device, pool
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.calls = 0

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run the function; inputs may lie in pinned memory and must keep shape and dtype."""
        if not self.calls:
            self.inputs = [torch.empty_like(value, device=self.device) for value in inputs]
        for own, value in zip(self.inputs, inputs, strict=True):
            own.copy_(value, non_blocking=True)
        self.calls += 1
        if self.calls <= CALLS_BEFORE:
            return self._run()
        if self.graph is None:
            self._record()
        assert self.graph is not None
        self.graph.replay()
        return self.output.clone()

    def _run(self) -> Tensor:
        """Run the function as it is, on the stream that it will be recorded on."""
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            output = self.function(*self.inputs)
        current.wait_stream(self.stream)
        output.record_stream(current)
        return output

    def _record(self) -> None:
        """Record the function, which runs nothing."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as the one that shows progress, may use the GPU meanwhile.
            with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                self.output = self.function(*self.inputs)
        except RuntimeError as error:
            raise RecordingFailed(
                f"{self.function.__name__} could not be recorded as a CUDA graph: {error}. `drama "
                "train --plain` does without, more slowly."
            ) from error
        self.graph = graph
