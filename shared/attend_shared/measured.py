"""What was measured on GPUs, and the orders that follow: written by `python -m benchmarks.gpu.learn`."""

from __future__ import annotations

from attend_shared.orders import Device, Order

DEVICES = {
    "9.0": Device(
        name="NVIDIA H100 80GB HBM3",
        date="2026-11-22",
        file="docs/results/gpu-h100.json",
        versions={
            "torch": {
                "torch": "2.11.0+cu130",
                "triton": "3.6.0",
                "flash-attn-4": "4.0.0b36",
                "CUDA": "13.0",
            },
            "jax": {
                "jax": "0.11.2",
                "jaxlib": "0.11.2",
                "triton": "3.6.0",
                "jax-triton": "0.3.1",
                "fa4-jax": "0.1.0",
                "dew-flash-attn-cu13": "0.3.6",
            },
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
                            "triton": (0.7313, 2.674),
                        },
                    },
                ),
                "a bias": Order(
                    ("triton",),
                    {
                        "trained bias (1, 16, 2048, 2048) 4x16x2048x64": {
                            "triton": (0.2437, 1.509),
                        },
                    },
                ),
                "segment ids": Order(
                    ("triton", "sdpa"),
                    {
                        "8 documents, causal 1x16x16384x128": {
                            "triton": (0.3339, 1.371),
                            "sdpa": (12.05, 29.93),
                        },
                    },
                ),
                "a softcap": Order(
                    ("triton", "fa4", "flex"),
                    {
                        "softcap 30.0, causal 4x16x4096x128": {
                            "triton": (0.7616, 3.117),
                            "fa4": (0.9617, 2.887),
                            "flex": (1.519, 5.342),
                        },
                    },
                ),
                "a window": Order(
                    ("fa4", "triton", "flex", "sdpa"),
                    {
                        "window 1024, causal 1x16x16384x128": {
                            "fa4": (0.2852, 1.057),
                            "triton": (0.3249, 1.374),
                            "flex": (0.425, 1.513),
                            "sdpa": (13.33, 31.08),
                        },
                    },
                ),
                "a key mask, causal": Order(
                    ("triton", "flex", "sdpa"),
                    {
                        "padded keys, causal 4x16x4096x64": {
                            "triton": (0.5406, 1.475),
                            "sdpa": (1.628, 4.373),
                        },
                    },
                ),
                "head sizes up to 64": Order(
                    ("fa4", "sdpa", "triton", "flex"),
                    {
                        "causal 4x16x4096x64": {
                            "fa4": (0.2977, 1.141),
                            "sdpa": (0.3302, 1.278),
                            "triton": (0.3692, 1.318),
                            "flex": (0.4216, 1.729),
                        },
                        "full 4x16x4096x64": {
                            "fa4": (0.5108, 1.789),
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
                            "fa4": (0.4319, 1.7),
                            "sdpa": (0.4745, 1.924),
                            "triton": (0.5673, 2.274),
                        },
                        "full 4x16x4096x128": {
                            "fa4": (0.7765, 2.992),
                            "sdpa": (0.8215, 3.327),
                            "triton": (1.05, 4.21),
                            "flex": (1.192, 4.548),
                        },
                    },
                ),
            },
            "jax": {
                "few queries": Order(
                    ("triton", "fa3", "fa4", "cudnn"),
                    {
                        "decoding 8x32/8x1:32768x128": {
                            "triton": (0.3732,),
                            "fa3": (0.6603,),
                            "fa4": (0.6702,),
                            "cudnn": (0.7566,),
                        },
                    },
                ),
                "a mask that is no key mask": Order(("triton",), {}),
                "a key mask": Order(
                    ("triton",),
                    {
                        "key mask with holes 4x16x4096x64": {
                            "triton": (1.111, 2.928),
                        },
                        "padded keys 4x16x4096x64": {
                            "triton": (0.4074, 1.459),
                        },
                    },
                ),
                "lengths": Order(("cudnn", "fa4", "triton"), {}),
                "sinks": Order(
                    ("triton",),
                    {
                        "sinks, causal 4x16x4096x64": {
                            "triton": (0.356, 1.304),
                        },
                    },
                ),
                "lse": Order(("triton",), {}),
                "an offset": Order(("fa4", "fa3", "triton"), {}),
                "a bias": Order(
                    ("triton",),
                    {
                        "trained bias (1, 16, 2048, 2048) 4x16x2048x64": {
                            "triton": (0.2414, 1.602),
                        },
                    },
                ),
                "short sequences": Order(
                    ("fa4", "triton", "fa3", "cudnn"),
                    {
                        "full 8x16x512x64": {
                            "fa4": (0.03109, 0.1077),
                            "triton": (0.04013, 0.1181),
                            "fa3": (0.05254, 0.1163),
                            "cudnn": (0.05733, 0.1156),
                        },
                    },
                ),
                "head sizes up to 64": Order(
                    ("fa3", "fa4", "cudnn", "triton"),
                    {
                        "causal 4x16x4096x64": {
                            "fa3": (0.2865, 0.988),
                            "fa4": (0.3349, 1.06),
                            "cudnn": (0.3326, 1.357),
                            "triton": (0.3531, 1.273),
                        },
                        "full 4x16x4096x64": {
                            "fa3": (0.5319, 1.729),
                            "fa4": (0.5067, 1.785),
                            "cudnn": (0.5751, 2.218),
                            "triton": (0.6414, 2.269),
                        },
                    },
                ),
                "larger head sizes": Order(("fa4", "fa3", "triton"), {}),
                "dropout": Order(
                    ("triton",),
                    {
                        "dropout 0.1, causal 4x16x4096x64": {
                            "triton": (0.6317, 2.307),
                        },
                    },
                ),
                "segment ids": Order(
                    ("triton",),
                    {
                        "8 documents, causal 1x16x16384x128": {
                            "triton": (0.3584, 1.489),
                        },
                    },
                ),
                "a softcap": Order(
                    ("triton",),
                    {
                        "softcap 30.0, causal 4x16x4096x128": {
                            "triton": (0.7542, 2.88),
                        },
                    },
                ),
                "a window": Order(
                    ("fa3", "fa4", "cudnn", "triton"),
                    {
                        "window 1024, causal 1x16x16384x128": {
                            "fa3": (0.2449, 1.053),
                            "fa4": (0.2702, 1.051),
                            "cudnn": (0.2918, 1.306),
                            "triton": (0.3317, 1.41),
                        },
                    },
                ),
                "a key mask, causal": Order(
                    ("triton",),
                    {
                        "padded keys, causal 4x16x4096x64": {
                            "triton": (0.2836, 1.026),
                        },
                    },
                ),
                "head sizes up to 128": Order(
                    ("fa3", "fa4", "cudnn", "triton"),
                    {
                        "causal 4x16x4096x128": {
                            "fa3": (0.3938, 1.66),
                            "fa4": (0.4401, 1.717),
                            "cudnn": (0.4833, 2.065),
                            "triton": (0.5861, 2.411),
                        },
                        "full 4x16x4096x128": {
                            "fa3": (0.7562, 3.029),
                            "fa4": (0.7681, 2.985),
                            "cudnn": (0.828, 3.441),
                            "triton": (1.141, 4.875),
                        },
                        "causal 1x32/8x8192x128": {
                            "fa3": (0.7247, 3.086),
                            "fa4": (0.8062, 3.223),
                            "cudnn": (0.917, 3.717),
                            "triton": (1.098, 4.556),
                        },
                    },
                ),
            },
        },
    ),
}
