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
                "float32": Order(
                    ("triton", "einsum", "blockwise"),
                    ("triton", "einsum", "blockwise"),
                    {
                        "causal 1x16x4096x64 float32": {
                            "triton": (0.5827, 2.652),
                            "einsum": (7.015, 19.03),
                            "blockwise": (9.395, 118.7),
                        },
                    },
                ),
                "few queries": Order(
                    ("triton", "fa4", "sdpa"),
                    ("triton", "fa4", "sdpa"),
                    {
                        "decoding 8x32/8x1:32768x128": {
                            "triton": (0.3628,),
                            "fa4": (0.3587,),
                            "sdpa": (0.3535,),
                        },
                        "key lengths, decoding 8x32/8x1:32768x128": {
                            "triton": (0.2178,),
                            "fa4": (1.999,),
                            "sdpa": (2.039,),
                        },
                    },
                ),
                "a mask that is no key mask": Order(
                    ("sdpa", "triton", "flex"),
                    ("triton", "sdpa", "flex"),
                    {
                        "mask (i, j) 4x16x4096x64": {
                            "sdpa": (1.06, 3.699),
                            "triton": (0.9528, 3.731),
                            "flex": (1.111, 4.609),
                        },
                    },
                ),
                "a key mask": Order(
                    ("triton", "sdpa"),
                    ("triton", "sdpa"),
                    {
                        "key mask with holes 4x16x4096x64": {
                            "triton": (0.5779, 1.859),
                            "sdpa": (1.055, 3.52),
                        },
                        "padded keys 4x16x4096x64": {
                            "triton": (0.4154, 1.507),
                            "sdpa": (1.079, 3.593),
                        },
                        "padded keys 64x12x512x64": {
                            "triton": (0.1394, 0.6964),
                            "sdpa": (0.3913, 1.205),
                        },
                    },
                ),
                "lengths": Order(
                    ("triton", "sdpa"),
                    ("triton", "sdpa"),
                    {
                        "key lengths, causal 4x16x4096x64": {
                            "triton": (0.2565, 1.007),
                            "sdpa": (1.661, 4.432),
                        },
                    },
                ),
                "sinks": Order(
                    ("fa4", "triton", "flex"),
                    ("fa4", "triton", "flex"),
                    {
                        "sinks, causal 4x16x4096x64": {
                            "fa4": (0.2926, 1.071),
                            "triton": (0.3082, 1.208),
                            "flex": (0.4433, 1.755),
                        },
                    },
                ),
                "lse": Order(
                    ("fa4", "triton"),
                    ("fa4", "triton"),
                    {
                        "with lse, causal 4x16x4096x128": {
                            "fa4": (0.4356, 1.707),
                            "triton": (0.4553, 2.134),
                        },
                    },
                ),
                "an offset": Order(
                    ("triton", "fa4", "sdpa"),
                    ("fa4", "triton", "sdpa"),
                    {
                        "causal 1x32/8x512:8192x128": {
                            "triton": (0.1014, 0.5283),
                            "fa4": (0.09702, 0.5309),
                            "sdpa": (0.2876, 0.9465),
                        },
                    },
                ),
                "few logits": Order(
                    ("sdpa", "fa4", "triton", "flex"),
                    ("triton", "sdpa", "fa4", "flex"),
                    {
                        "full 8x16x512x64": {
                            "sdpa": (0.03753, 0.3041),
                            "fa4": (0.04958, 0.3881),
                            "triton": (0.03633, 0.4397),
                            "flex": (0.2097, 0.9855),
                        },
                    },
                ),
                "short sequences": Order(
                    ("sdpa", "triton", "fa4"),
                    ("sdpa", "triton", "fa4"),
                    {
                        "full 64x16x256x64": {
                            "sdpa": (0.05409, 0.3282),
                            "triton": (0.06403, 0.3841),
                            "fa4": (0.09746, 0.3987),
                        },
                        "causal 64x16x256x64": {
                            "sdpa": (0.05057, 0.3023),
                            "triton": (0.05884, 0.3579),
                            "fa4": (0.3178, 1.025),
                        },
                    },
                ),
                "larger head sizes": Order(
                    ("sdpa", "fa4", "triton"),
                    ("fa4", "sdpa", "triton"),
                    {
                        "causal 4x16x4096x256": {
                            "sdpa": (0.8592, 4.521),
                            "fa4": (0.7822, 5.277),
                            "triton": (1.05, 5.868),
                        },
                    },
                ),
                "dropout": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "dropout 0.1, causal 4x16x4096x64": {
                            "triton": (0.6466, 1.916),
                        },
                        "dropout 0.1, causal 4x16x4096x128": {
                            "triton": (0.8627, 3.03),
                        },
                    },
                ),
                "a bias": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "trained bias (1, 16, 2048, 2048) 4x16x2048x64": {
                            "triton": (0.2188, 1.054),
                        },
                        "trained bias (4, 16, 2048, 2048) 4x16x2048x64": {
                            "triton": (0.2417, 1.135),
                        },
                        "bias (1, 16, 4096, 4096) 1x16x4096x64": {
                            "triton": (0.2337,),
                        },
                    },
                ),
                "segment ids": Order(
                    ("fa4", "triton", "sdpa"),
                    ("fa4", "triton", "sdpa"),
                    {
                        "8 documents, causal 1x16x16384x128": {
                            "fa4": (0.2711, 1.061),
                            "triton": (0.3502, 1.413),
                            "sdpa": (12.03, 29.81),
                        },
                    },
                ),
                "a softcap": Order(
                    ("triton", "fa4"),
                    ("triton", "fa4"),
                    {
                        "softcap 30.0, causal 4x16x4096x128": {
                            "triton": (0.7193, 2.764),
                            "fa4": (0.9718, 2.911),
                        },
                        "window 1024, softcap 50.0, causal 2x16x4096x128": {
                            "triton": (0.1988, 0.7849),
                            "fa4": (0.4398, 1.395),
                        },
                    },
                ),
                "a window": Order(
                    ("fa4", "triton", "flex", "sdpa"),
                    ("fa4", "triton", "flex", "sdpa"),
                    {
                        "window 1024, causal 1x16x16384x128": {
                            "fa4": (0.254, 1.028),
                            "triton": (0.2858, 1.226),
                            "flex": (0.4249, 1.521),
                            "sdpa": (13.27, 30.86),
                        },
                    },
                ),
                "a key mask, causal": Order(
                    ("triton", "sdpa"),
                    ("triton", "sdpa"),
                    {
                        "padded keys, causal 4x16x4096x64": {
                            "triton": (0.2929, 1.053),
                            "sdpa": (1.648, 4.415),
                        },
                    },
                ),
                "very short sequences": Order(
                    ("triton", "fa4", "sdpa"),
                    ("sdpa", "triton", "fa4"),
                    {
                        "full 512x12x128x64": {
                            "triton": (0.1403, 0.6306),
                            "fa4": (0.2045, 0.7914),
                            "sdpa": (0.135, 0.8123),
                        },
                    },
                ),
                "head sizes up to 64": Order(
                    ("fa4", "triton", "sdpa", "flex"),
                    ("fa4", "triton", "sdpa", "flex"),
                    {
                        "causal 4x16x4096x64": {
                            "fa4": (0.293, 1.018),
                            "triton": (0.3046, 1.175),
                            "sdpa": (0.3286, 1.27),
                            "flex": (0.4185, 1.718),
                        },
                        "full 4x16x4096x64": {
                            "fa4": (0.5032, 1.763),
                            "triton": (0.533, 2.051),
                            "sdpa": (0.5648, 2.095),
                        },
                    },
                ),
                "head sizes up to 128": Order(
                    ("fa4", "sdpa", "triton", "flex"),
                    ("fa4", "sdpa", "triton", "flex"),
                    {
                        "causal 4x16x4096x128": {
                            "fa4": (0.4276, 1.684),
                            "sdpa": (0.4701, 1.911),
                            "triton": (0.4479, 1.917),
                        },
                        "full 4x16x4096x128": {
                            "fa4": (0.7615, 2.94),
                            "sdpa": (0.8077, 3.26),
                            "triton": (0.8095, 3.424),
                            "flex": (1.135, 4.426),
                        },
                        "causal 1x32/8x8192x128": {
                            "fa4": (0.787, 3.171),
                            "sdpa": (0.9001, 3.57),
                            "triton": (0.8309, 4.235),
                        },
                        "causal 1x16x16384x128": {
                            "fa4": (1.512, 5.596),
                            "sdpa": (1.721, 6.429),
                            "triton": (1.559, 6.647),
                        },
                        "causal 4x16x4096x96": {
                            "fa4": (0.3796, 1.424),
                            "sdpa": (0.4738, 1.849),
                            "triton": (0.601, 2.285),
                        },
                    },
                ),
            },
            "jax": {
                "few queries": Order(
                    ("triton", "fa4", "fa3", "cudnn"),
                    ("triton", "fa4", "fa3", "cudnn"),
                    {
                        "decoding 8x32/8x1:32768x128": {
                            "triton": (0.3668,),
                            "fa4": (0.6593,),
                            "fa3": (0.6744,),
                            "cudnn": (0.7596,),
                        },
                    },
                ),
                "a mask that is no key mask": Order(("triton",), ("triton",), {}),
                "a key mask": Order(("triton",), ("triton",), {}),
                "lengths": Order(("cudnn", "fa4", "triton"), ("cudnn", "fa4", "triton"), {}),
                "sinks": Order(
                    ("fa3", "triton"),
                    ("fa3", "triton"),
                    {
                        "sinks, causal 4x16x4096x64": {
                            "fa3": (0.3113, 1.07),
                            "triton": (0.311, 1.216),
                        },
                    },
                ),
                "lse": Order(("triton",), ("triton",), {}),
                "an offset": Order(("fa4", "fa3", "triton"), ("fa4", "fa3", "triton"), {}),
                "a bias": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "trained bias (1, 16, 2048, 2048) 4x16x2048x64": {
                            "triton": (0.222, 1.153),
                        },
                    },
                ),
                "few logits": Order(
                    ("fa4", "fa3", "triton", "cudnn"),
                    ("fa4", "fa3", "triton", "cudnn"),
                    {
                        "full 8x16x512x64": {
                            "fa4": (0.03029, 0.1053),
                            "fa3": (0.03182, 0.1134),
                            "triton": (0.03713, 0.1184),
                            "cudnn": (0.04544, 0.1205),
                        },
                    },
                ),
                "very short sequences": Order(("fa4", "fa3", "cudnn", "triton"), ("fa4", "fa3", "cudnn", "triton"), {}),
                "short sequences": Order(("fa4", "fa3", "cudnn", "triton"), ("fa4", "fa3", "cudnn", "triton"), {}),
                "head sizes up to 64": Order(
                    ("fa3", "fa4", "triton", "cudnn"),
                    ("fa3", "fa4", "triton", "cudnn"),
                    {
                        "causal 4x16x4096x64": {
                            "fa3": (0.2846, 0.9849),
                            "fa4": (0.338, 1.06),
                            "triton": (0.3098, 1.184),
                            "cudnn": (0.346, 1.349),
                        },
                    },
                ),
                "larger head sizes": Order(("fa4", "fa3", "triton"), ("fa4", "fa3", "triton"), {}),
                "dropout": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "dropout 0.1, causal 4x16x4096x64": {
                            "triton": (0.6498, 1.94),
                        },
                    },
                ),
                "segment ids": Order(
                    ("fa3", "fa4", "triton"),
                    ("fa3", "fa4", "triton"),
                    {
                        "8 documents, causal 1x16x16384x128": {
                            "fa3": (0.2491, 1.037),
                            "fa4": (0.2744, 1.063),
                            "triton": (0.3601, 1.45),
                        },
                    },
                ),
                "a softcap": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "softcap 30.0, causal 4x16x4096x128": {
                            "triton": (0.7662, 2.868),
                        },
                    },
                ),
                "a window": Order(
                    ("fa3", "fa4", "triton", "cudnn"),
                    ("fa3", "fa4", "triton", "cudnn"),
                    {
                        "window 1024, causal 1x16x16384x128": {
                            "fa3": (0.2466, 1.048),
                            "fa4": (0.2707, 1.057),
                            "triton": (0.2919, 1.238),
                            "cudnn": (0.2998, 1.299),
                        },
                    },
                ),
                "a key mask, causal": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "padded keys, causal 4x16x4096x64": {
                            "triton": (0.2989, 1.08),
                        },
                    },
                ),
                "head sizes up to 128": Order(
                    ("fa3", "fa4", "triton", "cudnn"),
                    ("fa3", "fa4", "triton", "cudnn"),
                    {
                        "causal 4x16x4096x128": {
                            "fa3": (0.3979, 1.639),
                            "fa4": (0.4447, 1.731),
                            "triton": (0.4524, 1.932),
                            "cudnn": (0.4892, 2.049),
                        },
                        "full 4x16x4096x128": {
                            "fa3": (0.7465, 2.986),
                            "fa4": (0.762, 2.945),
                            "triton": (0.8063, 3.452),
                            "cudnn": (0.8389, 3.413),
                        },
                    },
                ),
            },
        },
    ),
}
