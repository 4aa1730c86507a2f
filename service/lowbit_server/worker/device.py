"""What the worker's device is and how much memory it has."""

from __future__ import annotations

from typing import NamedTuple

import psutil

from lowbit_server.hardware import processor_name


class Memory(NamedTuple):
    """Memory of a device, bytes."""

    total: int
    free: int


class Cpu:
    """The host's processors; its memory is the host's."""

    name = "cpu"

    def description(self) -> str:
        """Return the processor's name and the number of its logical cores."""
        return f"{processor_name()}, {psutil.cpu_count()} threads"

    def memory(self) -> Memory:
        """Return the host's memory; free is what can be had without swapping."""
        memory = psutil.virtual_memory()
        return Memory(memory.total, memory.available)


class Cuda:
    """One CUDA device."""

    def __init__(self, name: str) -> None:
        """Take the device `cuda:N`; raises RuntimeError when there is none."""
        # Only here: without a CUDA device the process starts without torch.
        import torch  # noqa: PLC0415

        self.name = name
        self._device = torch.device(name)
        self._cuda = torch.cuda
        self._cuda.set_device(self._device)

    def description(self) -> str:
        """Return the device's name."""
        return self._cuda.get_device_name(self._device)

    def memory(self) -> Memory:
        """Return the device's memory."""
        free, total = self._cuda.mem_get_info(self._device)
        return Memory(total, free)


def find_device(name: str) -> Cpu | Cuda:
    """Return the device that is called `cpu` or `cuda:N`."""
    return Cpu() if name == Cpu.name else Cuda(name)
