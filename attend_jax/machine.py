"""This machine as JAX sees it: what a finding of `attend doctor` holds for."""

from __future__ import annotations

import jax

from attend_shared.avoid import Machine, distributions, processor

KERNELS = (
    *(f"{name}-cuda{cuda}-{part}" for cuda in (12, 13) for name, part in (("jax", "plugin"), ("jax", "pjrt"))),
    "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "triton", "jax-triton", "fa4-jax", "nvidia-cutlass-dsl",
    "dew-flash-attn-cu13",
)  # fmt: skip


def machine(platform: str) -> Machine | None:
    """The device that calls run on, with the versions that decide what runs; None where there is none.

    Args:
        platform: "cpu" or "cuda".
    """
    versions = distributions(("attend-twin", "jax", "jaxlib"))
    backend = jax.default_backend()
    if platform == backend == "cpu":
        return Machine("jax", platform, processor(), "", versions)
    if platform == "cuda" and backend == "gpu":
        device = jax.devices()[0]
        capability = str(getattr(device, "compute_capability", ""))
        return Machine("jax", platform, device.device_kind, capability, versions | distributions(KERNELS))
    return None


def capability() -> str:
    """The compute capability of the first GPU, such as "9.0", or ""."""
    if not _CAPABILITY:
        gpu = jax.default_backend() == "gpu"
        _CAPABILITY.append(str(getattr(jax.devices()[0], "compute_capability", "")) if gpu else "")
    return _CAPABILITY[0]


_CAPABILITY: list[str] = []
