"""This machine as torch sees it: what a finding of `attend doctor` holds for."""

from __future__ import annotations

import torch

from attend_shared.avoid import Machine, distributions, processor

KERNELS = ("triton", "flash-attn-4", "nvidia-cutlass-dsl", "quack-kernels")


def machine(platform: str) -> Machine | None:
    """The device that calls run on, with the versions that decide what runs; None where there is none.

    Args:
        platform: "cpu" or "cuda".
    """
    versions = {**distributions(("attend-twin",)), "torch": str(torch.__version__)}
    if platform == "cpu":
        return Machine("torch", platform, processor(), torch.backends.cpu.get_cpu_capability(), versions)
    if platform == "cuda" and torch.cuda.is_available():
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        return Machine("torch", platform, torch.cuda.get_device_name(), capability, versions | distributions(KERNELS))
    return None


def capability() -> str:
    """The compute capability of the GPU that was current when it was first asked for, such as "9.0", or ""."""
    if not _CAPABILITY:
        _CAPABILITY.append(".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else "")
    return _CAPABILITY[0]


_CAPABILITY: list[str] = []
capability._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as in attend_torch.attend
