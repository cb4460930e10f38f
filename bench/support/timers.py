"""Timers of one repetition: by the host's clock, or by device events; with a cold cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Sample(NamedTuple):
    """One repetition, in milliseconds; `host` is the time after which the host was free again."""

    forward: float
    backward: float
    host: float


class Timer(Protocol):
    """Times one forward and backward. `hold`: milliseconds for which the host may be ahead."""

    name: str

    def sample(
        self, forward: Callable[[], Tensor], backward: Callable[[Tensor], Any], hold: float
    ) -> Sample: ...


def synchronise(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class HostTimer:
    """The host's clock with synchronisation: for a CPU, and to rehearse a GPU's run on one."""

    name = "host"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def sample(
        self, forward: Callable[[], Tensor], backward: Callable[[Tensor], Any], hold: float
    ) -> Sample:
        """One repetition."""
        synchronise(self.device)
        start = time.perf_counter()
        y = forward()
        synchronise(self.device)
        middle = time.perf_counter()
        backward(y)
        synchronise(self.device)
        end = time.perf_counter()
        return Sample((middle - start) * 1e3, (end - middle) * 1e3, (end - start) * 1e3)


class ColdTimer(HostTimer):
    """The host's clock; before each repetition a buffer larger than the caches is overwritten."""

    name = "cold"

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.flush = torch.empty(128 << 20, dtype=torch.int8)

    def sample(
        self, forward: Callable[[], Tensor], backward: Callable[[Tensor], Any], hold: float
    ) -> Sample:
        """One repetition."""
        self.flush.zero_()
        return super().sample(forward, backward, hold)


class DeviceTimer:
    """Device events with a cold cache.

    Before each repetition a buffer larger than the L2 is overwritten, and the device is then held
    until the host has launched everything, so that the gaps between launches are not counted.
    """

    name = "device"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        size = max(256 << 20, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
        self.flush = torch.empty(size, dtype=torch.int8, device=device)
        start, end = self.event(), self.event()
        for _ in range(2):  # the first loads the module
            start.record()
            torch.cuda._sleep(10_000_000)
            end.record()
        torch.cuda.synchronize(device)
        self.cycles_per_ms = 10_000_000 / start.elapsed_time(end)

    @staticmethod
    def event() -> torch.cuda.Event:
        """An event that takes the time."""
        return torch.cuda.Event(enable_timing=True)

    def sample(
        self, forward: Callable[[], Tensor], backward: Callable[[Tensor], Any], hold: float
    ) -> Sample:
        """One repetition."""
        start, middle, end = self.event(), self.event(), self.event()
        torch.cuda.synchronize(self.device)
        self.flush.zero_()
        torch.cuda._sleep(int(self.cycles_per_ms * hold))
        begun = time.perf_counter()
        start.record()
        y = forward()
        middle.record()
        backward(y)
        end.record()
        host = (time.perf_counter() - begun) * 1e3
        torch.cuda.synchronize(self.device)
        return Sample(start.elapsed_time(middle), middle.elapsed_time(end), host)


TIMERS: dict[str, Callable[[torch.device], Timer]] = {
    "host": HostTimer,
    "device": DeviceTimer,
    "cold": ColdTimer,
}
