"""Trainings in processes of their own: on several devices, which a process has to ask for before it starts jax."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent

TINY = [
    "--preset=hundred_lines",
    "--scene=bricks",
    "--image_size=16",
    "--eval_views=2",
    "--override=field.encoding.num_levels=1",
    "--override=field.encoding.table_size=2**10",
    "--override=field.encoding.max_resolution=16",
    "--override=field.hidden_width=8",
    "--override=field.colour_layers=0",
    "--override=sampler.num_bins=8",
    "--override=train.num_rays=64",
    "--override=train.steps_per_dispatch=4",
]
"""A NeRF without an occupancy grid, whose programs compile in a few seconds."""


def environment(num_devices: int) -> dict[str, str]:
    """With so many devices on a CPU, and a compiler that hurries."""
    flags = f"--xla_force_host_platform_device_count={num_devices} --xla_backend_optimization_level=0"
    return os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start(module: str, arguments: Sequence[str], *, num_processes: int, num_devices: int = 1) -> list[subprocess.Popen]:
    """The processes of a command, which find each other on this machine."""
    port = free_port()
    processes = []
    for number in range(num_processes):
        several = [
            f"--coordinator_address=127.0.0.1:{port}",
            f"--num_processes={num_processes}",
            f"--process_id={number}",
        ]
        command = [sys.executable, "-m", module, *arguments, *(several if num_processes > 1 else [])]
        processes.append(
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment(num_devices),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def end(processes: Sequence[subprocess.Popen]) -> None:
    """Kill those that still run, and leave nothing open."""
    for process in processes:
        process.kill()
        process.wait()
        if process.stdout and not process.stdout.closed:
            process.stdout.close()


def finish(processes: Sequence[subprocess.Popen], timeout: float = 900) -> list[str]:
    """What the processes printed, all of which have to succeed."""
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        end(processes)
    assert [process.returncode for process in processes] == [0] * len(processes), "\n\n".join(printed)
    return printed
