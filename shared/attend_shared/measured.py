"""What was measured on GPUs, and the orders that follow: written by `python -m benchmarks.gpu.learn`."""

from __future__ import annotations

from attend_shared.orders import Device, Order

DEVICES = {
    "9.0": Device(
        name="NVIDIA H100 80GB HBM3",
        date="2026-11-22",
        file="docs/results/gpu-h100.json",
        versions={
            "torch": {"torch": "2.11.0+cu130", "triton": "3.6.0", "flash-attn-4": "4.0.0b36", "CUDA": "13.0"},
            "jax": {"jax": "0.11.2", "jaxlib": "0.11.2", "triton": "3.6.0", "jax-triton": "0.3.1", "fa4-jax": "0.1.0"},
        },
        orders={
            "torch": {
                "float32": Order(("triton", "blockwise", "einsum"), {}),
                "few queries": Order(("sdpa", "triton", "flex", "fa4"), {}),
                "a mask that is no key mask": Order(("triton", "sdpa", "flex"), {}),
                "a key mask": Order(("triton", "flex", "sdpa"), {}),
                "lengths": Order(("fa4", "triton", "flex", "sdpa"), {}),
                "sinks": Order(("fa4", "triton", "flex"), {}),
                "lse": Order(("fa4", "triton", "flex"), {}),
                "an offset": Order(("fa4", "triton", "flex", "sdpa"), {}),
                "short sequences": Order(("sdpa", "triton", "fa4", "flex"), {}),
                "larger head sizes": Order(("sdpa", "fa4", "triton", "flex"), {}),
                "dropout": Order(
                    ("triton",),
                    {
                        "dropout 0.1, causal 4x16x4096x64": {
                            "triton": (0.7314, 2.677),
                        },
                    },
                ),
                "a bias": Order(
                    ("triton",),
                    {
                        "trained bias (1, 16, 2048, 2048) 4x16x2048x64": {
                            "triton": (0.2437, 1.511),
                        },
                    },
                ),
                "segment ids": Order(
                    ("triton", "flex", "sdpa"),
                    {
                        "8 documents, causal 1x16x16384x128": {
                            "triton": (0.4117, 1.632),
                            "flex": (0.8119, 1.895),
                            "sdpa": (12.03, 29.85),
                        },
                    },
                ),
                "a softcap": Order(
                    ("triton", "fa4", "flex"),
                    {
                        "softcap 30.0, causal 4x16x4096x128": {
                            "triton": (0.7616, 3.117),
                            "fa4": (0.9622, 2.918),
                            "flex": (1.519, 5.342),
                        },
                    },
                ),
                "a window": Order(
                    ("fa4", "triton", "flex", "sdpa"),
                    {
                        "window 1024, causal 1x16x16384x128": {
                            "fa4": (0.3006, 1.13),
                            "triton": (0.3462, 1.405),
                            "flex": (0.4251, 1.52),
                            "sdpa": (13.28, 30.9),
                        },
                    },
                ),
                "a key mask, causal": Order(
                    ("triton", "flex", "sdpa"),
                    {
                        "padded keys, causal 4x16x4096x64": {
                            "triton": (0.5405, 1.474),
                            "sdpa": (1.628, 4.373),
                        },
                    },
                ),
                "head sizes up to 64": Order(
                    ("fa4", "sdpa", "triton", "flex"),
                    {
                        "causal 4x16x4096x64": {
                            "fa4": (0.3092, 1.142),
                            "sdpa": (0.3302, 1.278),
                            "triton": (0.3692, 1.318),
                            "flex": (0.4216, 1.729),
                        },
                        "full 4x16x4096x64": {
                            "fa4": (0.5116, 1.79),
                            "sdpa": (0.5655, 2.099),
                            "triton": (0.6091, 2.257),
                            "flex": (0.6782, 2.893),
                        },
                    },
                ),
                "head sizes up to 128": Order(
                    ("fa4", "sdpa", "triton", "flex"),
                    {
                        "causal 4x16x4096x128": {
                            "fa4": (0.4301, 1.697),
                            "sdpa": (0.4754, 1.923),
                            "triton": (0.5851, 2.273),
                        },
                        "full 4x16x4096x128": {
                            "fa4": (0.7769, 2.995),
                            "sdpa": (0.8215, 3.327),
                            "triton": (1.05, 4.21),
                            "flex": (1.192, 4.548),
                        },
                    },
                ),
            },
            "jax": {
                "few queries": Order(("cudnn", "triton", "fa4", "fa3"), {}),
                "a mask that is no key mask": Order(("triton",), {}),
                "a key mask": Order(("triton",), {}),
                "lengths": Order(("cudnn", "fa4", "triton"), {}),
                "sinks": Order(("triton",), {}),
                "lse": Order(("triton",), {}),
                "an offset": Order(("fa4", "fa3", "triton"), {}),
                "a bias": Order(("triton",), {}),
                "short sequences": Order(("fa4", "fa3", "cudnn", "triton"), {}),
                "head sizes up to 64": Order(("fa4", "fa3", "cudnn", "triton"), {}),
                "larger head sizes": Order(("fa4", "fa3", "triton"), {}),
                "dropout": Order(
                    ("triton",),
                    {
                        "dropout 0.1, causal 4x16x4096x64": {
                            "triton": (0.7022, 2.613),
                        },
                    },
                ),
                "segment ids": Order(
                    ("triton",),
                    {
                        "8 documents, causal 1x16x16384x128": {
                            "triton": (0.5177, 1.942),
                        },
                    },
                ),
                "a softcap": Order(
                    ("triton",),
                    {
                        "softcap 30.0, causal 4x16x4096x128": {
                            "triton": (0.8279, 3.573),
                        },
                    },
                ),
                "a window": Order(
                    ("fa4", "cudnn", "triton"),
                    {
                        "window 1024, causal 1x16x16384x128": {
                            "fa4": (0.2786, 1.123),
                            "cudnn": (0.3216, 1.382),
                            "triton": (0.4232, 1.61),
                        },
                    },
                ),
                "a key mask, causal": Order(
                    ("triton",),
                    {
                        "padded keys, causal 4x16x4096x64": {
                            "triton": (0.5356, 1.502),
                        },
                    },
                ),
                "head sizes up to 128": Order(
                    ("fa4", "cudnn", "triton"),
                    {
                        "causal 4x16x4096x128": {
                            "fa4": (0.4615, 1.817),
                            "cudnn": (0.5562, 2.241),
                            "triton": (0.6904, 2.626),
                        },
                    },
                ),
            },
        },
    ),
}
