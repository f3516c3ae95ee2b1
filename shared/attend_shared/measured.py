"""What was measured on GPUs, and the orders that follow: written by `python -m benchmarks.gpu.learn`."""

from __future__ import annotations

from attend_shared.orders import Device, Order

DEVICES = {
    "9.0": Device(
        name="NVIDIA H100 80GB HBM3",
        date="2026-11-23",
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
                            "triton": (0.5956, 2.66),
                            "einsum": (7.022, 19.06),
                            "blockwise": (8.335, 111),
                        },
                    },
                ),
                "few queries": Order(
                    ("triton", "fa4", "sdpa", "flex"),
                    ("triton", "fa4", "sdpa", "flex"),
                    {
                        "decoding 8x32/8x1:32768x128": {
                            "triton": (0.3628,),
                            "fa4": (0.3578,),
                            "sdpa": (0.353,),
                            "flex": (1.128,),
                        },
                        "key lengths, decoding 8x32/8x1:32768x128": {
                            "triton": (0.2181,),
                            "fa4": (2.007,),
                            "sdpa": (2.04,),
                        },
                    },
                ),
                "a mask that is no key mask": Order(
                    ("triton", "sdpa", "flex"),
                    ("triton", "sdpa", "flex"),
                    {
                        "mask (i, j) 4x16x4096x64": {
                            "triton": (0.9637, 3.427),
                            "sdpa": (1.05, 3.701),
                            "flex": (1.122, 4.608),
                        },
                    },
                ),
                "a key mask": Order(
                    ("triton", "flex", "sdpa"),
                    ("triton", "flex", "sdpa"),
                    {
                        "key mask with holes 4x16x4096x64": {
                            "triton": (0.5758, 1.846),
                            "sdpa": (1.087, 3.623),
                        },
                        "padded keys 4x16x4096x64": {
                            "triton": (0.4181, 1.497),
                            "flex": (0.8002, 2.35),
                            "sdpa": (1.088, 3.625),
                        },
                        "padded keys 64x12x512x64": {
                            "triton": (0.1412, 0.5029),
                            "sdpa": (0.3971, 1.217),
                        },
                    },
                ),
                "lengths": Order(
                    ("triton", "sdpa"),
                    ("triton", "sdpa"),
                    {
                        "key lengths, causal 4x16x4096x64": {
                            "triton": (0.2544, 0.9994),
                            "sdpa": (1.674, 4.468),
                        },
                    },
                ),
                "sinks": Order(
                    ("fa4", "triton", "flex"),
                    ("fa4", "triton", "flex"),
                    {
                        "sinks, causal 4x16x4096x64": {
                            "fa4": (0.2961, 1.082),
                            "triton": (0.3114, 1.192),
                            "flex": (0.4405, 1.773),
                        },
                    },
                ),
                "lse": Order(
                    ("fa4", "triton"),
                    ("fa4", "triton"),
                    {
                        "with lse, causal 4x16x4096x128": {
                            "fa4": (0.4362, 1.711),
                            "triton": (0.4558, 1.893),
                        },
                    },
                ),
                "an offset": Order(
                    ("triton", "fa4", "flex", "sdpa"),
                    ("fa4", "triton", "flex", "sdpa"),
                    {
                        "causal 1x32/8x512:8192x128": {
                            "triton": (0.1022, 0.5034),
                            "fa4": (0.09764, 0.5111),
                            "flex": (0.1802, 0.8088),
                            "sdpa": (0.2698, 0.9431),
                        },
                    },
                ),
                "few logits": Order(
                    ("sdpa", "triton", "fa4", "flex"),
                    ("sdpa", "triton", "fa4", "flex"),
                    {
                        "full 8x16x512x64": {
                            "sdpa": (0.02709, 0.1617),
                            "triton": (0.02824, 0.252),
                            "fa4": (0.03315, 0.2777),
                            "flex": (0.1765, 0.762),
                        },
                    },
                ),
                "short sequences": Order(
                    ("triton", "sdpa", "fa4"),
                    ("sdpa", "triton", "fa4"),
                    {
                        "full 64x16x256x64": {
                            "triton": (0.06431, 0.2863),
                            "sdpa": (0.05433, 0.3242),
                            "fa4": (0.09767, 0.3204),
                        },
                        "causal 64x16x256x64": {
                            "triton": (0.05953, 0.2486),
                            "sdpa": (0.05088, 0.3049),
                            "fa4": (0.1027, 0.3144),
                        },
                    },
                ),
                "head sizes up to 96": Order(
                    ("fa4", "sdpa", "triton"),
                    ("fa4", "sdpa", "triton"),
                    {
                        "causal 4x16x4096x96": {
                            "fa4": (0.3758, 1.413),
                            "sdpa": (0.4748, 1.852),
                            "triton": (0.5936, 2.282),
                        },
                    },
                ),
                "larger head sizes": Order(
                    ("sdpa", "fa4", "triton"),
                    ("fa4", "sdpa", "triton"),
                    {
                        "causal 4x16x4096x256": {
                            "sdpa": (0.8504, 4.49),
                            "fa4": (0.7708, 5.273),
                            "triton": (1.052, 5.886),
                        },
                    },
                ),
                "dropout": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "dropout 0.1, causal 4x16x4096x64": {
                            "triton": (0.6466, 1.888),
                        },
                        "dropout 0.1, causal 4x16x4096x128": {
                            "triton": (0.8508, 2.749),
                        },
                    },
                ),
                "a bias": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "trained bias (1, 16, 2048, 2048) 4x16x2048x64": {
                            "triton": (0.2209, 0.939),
                        },
                        "trained bias (4, 16, 2048, 2048) 4x16x2048x64": {
                            "triton": (0.2433, 1.018),
                        },
                        "bias (1, 16, 4096, 4096) 1x16x4096x64": {
                            "triton": (0.2324,),
                        },
                    },
                ),
                "segment ids": Order(
                    ("fa4", "triton", "sdpa"),
                    ("fa4", "triton", "sdpa"),
                    {
                        "8 documents, causal 1x16x16384x128": {
                            "fa4": (0.262, 1.051),
                            "triton": (0.3321, 1.236),
                            "sdpa": (12.03, 29.86),
                        },
                    },
                ),
                "a softcap": Order(
                    ("triton", "fa4", "flex"),
                    ("triton", "fa4", "flex"),
                    {
                        "softcap 30.0, causal 4x16x4096x128": {
                            "triton": (0.5183, 2.547),
                            "fa4": (0.9706, 2.91),
                            "flex": (1.515, 5.286),
                        },
                        "window 1024, softcap 50.0, causal 2x16x4096x128": {
                            "triton": (0.1657, 0.7594),
                            "fa4": (0.2685, 0.8335),
                        },
                    },
                ),
                "a window": Order(
                    ("fa4", "triton", "flex", "sdpa"),
                    ("fa4", "triton", "flex", "sdpa"),
                    {
                        "window 1024, causal 1x16x16384x128": {
                            "fa4": (0.2575, 1.041),
                            "triton": (0.2893, 1.173),
                            "flex": (0.425, 1.52),
                            "sdpa": (13.31, 31),
                        },
                    },
                ),
                "a key mask, causal": Order(
                    ("triton", "flex", "sdpa"),
                    ("triton", "flex", "sdpa"),
                    {
                        "padded keys, causal 4x16x4096x64": {
                            "triton": (0.2907, 1.041),
                            "flex": (1.125, 2.278),
                            "sdpa": (1.654, 4.424),
                        },
                    },
                ),
                "very short sequences": Order(
                    ("triton", "fa4", "sdpa"),
                    ("sdpa", "triton", "fa4"),
                    {
                        "full 512x12x128x64": {
                            "triton": (0.1408, 0.6347),
                            "fa4": (0.2056, 0.7944),
                            "sdpa": (0.1353, 0.8106),
                        },
                    },
                ),
                "all pairs, head sizes up to 128": Order(
                    ("fa4", "sdpa", "triton", "flex"),
                    ("fa4", "triton", "sdpa", "flex"),
                    {
                        "full 4x16x4096x128": {
                            "fa4": (0.7703, 2.975),
                            "sdpa": (0.8163, 3.306),
                            "triton": (0.8184, 3.395),
                            "flex": (1.144, 4.47),
                        },
                        "full 4x16x4096x64": {
                            "fa4": (0.5117, 1.786),
                            "sdpa": (0.5739, 2.13),
                            "triton": (0.5405, 2.08),
                        },
                    },
                ),
                "head sizes up to 64": Order(
                    ("fa4", "triton", "sdpa", "flex"),
                    ("fa4", "triton", "sdpa", "flex"),
                    {
                        "causal 4x16x4096x64": {
                            "fa4": (0.2952, 1.028),
                            "triton": (0.3077, 1.16),
                            "sdpa": (0.332, 1.283),
                            "flex": (0.4237, 1.731),
                        },
                    },
                ),
                "head sizes up to 128": Order(
                    ("fa4", "triton", "sdpa", "flex"),
                    ("fa4", "triton", "sdpa", "flex"),
                    {
                        "causal 4x16x4096x128": {
                            "fa4": (0.4349, 1.708),
                            "triton": (0.4547, 1.888),
                            "sdpa": (0.4794, 1.938),
                        },
                        "causal 1x32/8x8192x128": {
                            "fa4": (0.7817, 3.161),
                            "triton": (0.8266, 3.501),
                            "sdpa": (0.8996, 3.567),
                            "flex": (1.42, 5.307),
                        },
                        "causal 1x16x16384x128": {
                            "fa4": (1.529, 5.648),
                            "triton": (1.577, 6.711),
                            "sdpa": (1.743, 6.491),
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
                            "triton": (0.3654,),
                            "fa4": (0.6722,),
                            "fa3": (0.6823,),
                            "cudnn": (0.7622,),
                        },
                        "key lengths, decoding 8x32/8x1:32768x128": {
                            "triton": (0.2197,),
                            "fa4": (0.3905,),
                            "cudnn": (1.291,),
                        },
                    },
                ),
                "a mask that is no key mask": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "mask (i, j) 4x16x4096x64": {
                            "triton": (0.9744, 3.414),
                        },
                    },
                ),
                "a key mask": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "key mask with holes 4x16x4096x64": {
                            "triton": (0.5929, 1.902),
                        },
                        "padded keys 4x16x4096x64": {
                            "triton": (0.428, 1.514),
                        },
                        "padded keys 64x12x512x64": {
                            "triton": (0.1494, 0.5246),
                        },
                    },
                ),
                "lengths": Order(
                    ("triton", "cudnn"),
                    ("triton", "cudnn"),
                    {
                        "key lengths, causal 4x16x4096x64": {
                            "triton": (0.2774, 1.034),
                            "cudnn": (0.358, 1.283),
                        },
                    },
                ),
                "sinks": Order(
                    ("fa3", "triton"),
                    ("fa3", "triton"),
                    {
                        "sinks, causal 4x16x4096x64": {
                            "fa3": (0.3132, 1.087),
                            "triton": (0.3181, 1.203),
                        },
                    },
                ),
                "lse": Order(
                    ("fa3", "fa4", "triton"),
                    ("fa3", "fa4", "triton"),
                    {
                        "with lse, causal 4x16x4096x128": {
                            "fa3": (0.4021, 1.668),
                            "fa4": (0.4537, 1.724),
                            "triton": (0.4551, 1.89),
                        },
                    },
                ),
                "an offset": Order(
                    ("triton", "fa4", "fa3"),
                    ("fa3", "triton", "fa4"),
                    {
                        "causal 1x32/8x512:8192x128": {
                            "triton": (0.1026, 0.5066),
                            "fa4": (0.1044, 0.5203),
                            "fa3": (0.09922, 0.5451),
                        },
                    },
                ),
                "a bias": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "trained bias (1, 16, 2048, 2048) 4x16x2048x64": {
                            "triton": (0.2246, 0.9508),
                        },
                        "trained bias (4, 16, 2048, 2048) 4x16x2048x64": {
                            "triton": (0.2465, 1.023),
                        },
                        "bias (1, 16, 4096, 4096) 1x16x4096x64": {
                            "triton": (0.2359,),
                        },
                    },
                ),
                "few logits": Order(
                    ("fa4", "fa3", "triton", "cudnn"),
                    ("fa4", "fa3", "triton", "cudnn"),
                    {
                        "full 8x16x512x64": {
                            "fa4": (0.03075, 0.1066),
                            "fa3": (0.03292, 0.1134),
                            "triton": (0.03337, 0.1149),
                            "cudnn": (0.04324, 0.1231),
                        },
                    },
                ),
                "very short sequences": Order(
                    ("triton", "fa3", "fa4", "cudnn"),
                    ("triton", "cudnn", "fa3", "fa4"),
                    {
                        "full 512x12x128x64": {
                            "triton": (0.1434, 0.6434),
                            "fa3": (0.1875, 0.7876),
                            "fa4": (0.2145, 0.8063),
                            "cudnn": (0.1764, 1.033),
                        },
                    },
                ),
                "short sequences": Order(
                    ("triton", "fa4", "fa3", "cudnn"),
                    ("triton", "cudnn", "fa3", "fa4"),
                    {
                        "full 64x16x256x64": {
                            "triton": (0.07548, 0.3026),
                            "fa4": (0.1004, 0.3292),
                            "fa3": (0.1101, 0.3493),
                            "cudnn": (0.08997, 0.4096),
                        },
                        "causal 64x16x256x64": {
                            "triton": (0.06313, 0.2572),
                            "fa4": (0.1087, 0.3264),
                            "fa3": (0.08398, 0.3243),
                            "cudnn": (0.07852, 0.3908),
                        },
                    },
                ),
                "head sizes up to 64": Order(
                    ("fa3", "fa4", "triton", "cudnn"),
                    ("fa3", "triton", "fa4", "cudnn"),
                    {
                        "causal 4x16x4096x64": {
                            "fa3": (0.2861, 0.997),
                            "fa4": (0.3402, 1.07),
                            "triton": (0.3108, 1.169),
                            "cudnn": (0.3465, 1.366),
                        },
                    },
                ),
                "head sizes up to 96": Order(
                    ("fa4", "fa3", "cudnn", "triton"),
                    ("fa3", "fa4", "cudnn", "triton"),
                    {
                        "causal 4x16x4096x96": {
                            "fa4": (0.4177, 1.481),
                            "fa3": (0.3947, 1.614),
                            "cudnn": (0.5026, 2.004),
                            "triton": (0.6323, 2.441),
                        },
                    },
                ),
                "larger head sizes": Order(
                    ("fa3", "fa4", "triton"),
                    ("fa3", "fa4", "triton"),
                    {
                        "causal 4x16x4096x256": {
                            "fa3": (0.7689, 3.992),
                            "fa4": (0.8016, 5.518),
                            "triton": (1.084, 6.028),
                        },
                    },
                ),
                "float32": Order(
                    ("triton", "einsum", "blockwise"),
                    ("triton", "einsum", "blockwise"),
                    {
                        "causal 1x16x4096x64 float32": {
                            "triton": (0.6097, 2.702),
                            "einsum": (3.156, 8.039),
                            "blockwise": (4.841, 15.61),
                        },
                    },
                ),
                "dropout": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "dropout 0.1, causal 4x16x4096x64": {
                            "triton": (0.6553, 1.92),
                        },
                        "dropout 0.1, causal 4x16x4096x128": {
                            "triton": (0.8509, 2.814),
                        },
                    },
                ),
                "segment ids": Order(
                    ("fa3", "fa4", "triton"),
                    ("fa3", "fa4", "triton"),
                    {
                        "8 documents, causal 1x16x16384x128": {
                            "fa3": (0.255, 1.058),
                            "fa4": (0.2807, 1.094),
                            "triton": (0.3446, 1.268),
                        },
                    },
                ),
                "a softcap": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "softcap 30.0, causal 4x16x4096x128": {
                            "triton": (0.5358, 2.596),
                        },
                        "window 1024, softcap 50.0, causal 2x16x4096x128": {
                            "triton": (0.1741, 0.7831),
                        },
                    },
                ),
                "a window": Order(
                    ("fa3", "fa4", "triton", "cudnn"),
                    ("fa3", "fa4", "triton", "cudnn"),
                    {
                        "window 1024, causal 1x16x16384x128": {
                            "fa3": (0.2504, 1.061),
                            "fa4": (0.2719, 1.065),
                            "triton": (0.2926, 1.204),
                            "cudnn": (0.3027, 1.312),
                        },
                    },
                ),
                "a key mask, causal": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "padded keys, causal 4x16x4096x64": {
                            "triton": (0.2874, 1.072),
                        },
                    },
                ),
                "all pairs, head sizes up to 128": Order(
                    ("fa4", "fa3", "triton", "cudnn"),
                    ("fa4", "fa3", "triton", "cudnn"),
                    {
                        "full 4x16x4096x128": {
                            "fa4": (0.7587, 2.907),
                            "fa3": (0.8164, 3.153),
                            "triton": (0.7971, 3.367),
                            "cudnn": (0.8265, 3.388),
                        },
                        "full 4x16x4096x64": {
                            "fa4": (0.508, 1.769),
                            "fa3": (0.5238, 1.795),
                            "triton": (0.5527, 2.058),
                            "cudnn": (0.5915, 2.209),
                        },
                    },
                ),
                "head sizes up to 128": Order(
                    ("fa3", "fa4", "triton", "cudnn"),
                    ("fa3", "fa4", "triton", "cudnn"),
                    {
                        "causal 4x16x4096x128": {
                            "fa3": (0.4064, 1.666),
                            "fa4": (0.4518, 1.74),
                            "triton": (0.46, 1.9),
                            "cudnn": (0.5064, 2.066),
                        },
                        "causal 1x32/8x8192x128": {
                            "fa3": (0.7452, 3.066),
                            "fa4": (0.8196, 3.235),
                            "triton": (0.8272, 3.487),
                            "cudnn": (0.9696, 3.724),
                        },
                        "causal 1x16x16384x128": {
                            "fa3": (1.46, 5.737),
                            "fa4": (1.581, 5.796),
                            "triton": (1.562, 6.835),
                            "cudnn": (1.733, 6.825),
                        },
                    },
                ),
            },
        },
    ),
}
