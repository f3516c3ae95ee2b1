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
                            "sdpa": (0.03527, 0.1994),
                            "fa4": (0.03606, 0.2661),
                            "triton": (0.02835, 0.2841),
                            "flex": (0.1935, 0.7299),
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
                "head sizes up to 96": Order(
                    ("fa4", "sdpa", "triton"),
                    ("fa4", "sdpa", "triton"),
                    {
                        "causal 4x16x4096x96": {
                            "fa4": (0.3796, 1.424),
                            "sdpa": (0.4738, 1.849),
                            "triton": (0.601, 2.285),
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
                            "fa4": (0.2633, 1.06),
                            "triton": (0.3338, 1.295),
                            "sdpa": (12.06, 30),
                        },
                    },
                ),
                "a softcap": Order(
                    ("triton", "fa4", "flex"),
                    ("triton", "fa4", "flex"),
                    {
                        "softcap 30.0, causal 4x16x4096x128": {
                            "triton": (0.7639, 2.787),
                            "fa4": (0.9619, 2.933),
                            "flex": (1.53, 5.384),
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
                            "fa4": (0.2575, 1.041),
                            "triton": (0.2893, 1.173),
                            "flex": (0.425, 1.52),
                            "sdpa": (13.31, 31),
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
                            "triton": (0.1408, 0.6347),
                            "fa4": (0.2056, 0.7944),
                            "sdpa": (0.1353, 0.8106),
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
                        "full 4x16x4096x64": {
                            "fa4": (0.5117, 1.786),
                            "triton": (0.5405, 2.08),
                            "sdpa": (0.5739, 2.13),
                        },
                    },
                ),
                "head sizes up to 128": Order(
                    ("fa4", "sdpa", "triton", "flex"),
                    ("fa4", "triton", "sdpa", "flex"),
                    {
                        "causal 4x16x4096x128": {
                            "fa4": (0.4349, 1.708),
                            "sdpa": (0.4794, 1.938),
                            "triton": (0.4547, 1.888),
                        },
                        "full 4x16x4096x128": {
                            "fa4": (0.7703, 2.975),
                            "sdpa": (0.8163, 3.306),
                            "triton": (0.8184, 3.395),
                            "flex": (1.144, 4.47),
                        },
                        "causal 1x32/8x8192x128": {
                            "fa4": (0.7817, 3.161),
                            "sdpa": (0.8996, 3.567),
                            "triton": (0.8266, 3.501),
                            "flex": (1.42, 5.307),
                        },
                        "causal 1x16x16384x128": {
                            "fa4": (1.529, 5.648),
                            "sdpa": (1.743, 6.491),
                            "triton": (1.577, 6.711),
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
                            "triton": (0.3753,),
                            "fa4": (0.6567,),
                            "fa3": (0.6692,),
                            "cudnn": (0.7556,),
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
                            "triton": (0.278, 1.033),
                            "cudnn": (0.3577, 1.262),
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
                    ("triton",),
                    ("triton",),
                    {
                        "with lse, causal 4x16x4096x128": {
                            "triton": (0.4596, 1.904),
                        },
                    },
                ),
                "an offset": Order(
                    ("triton", "fa4", "fa3"),
                    ("fa3", "triton", "fa4"),
                    {
                        "causal 1x32/8x512:8192x128": {
                            "triton": (0.1018, 0.5031),
                            "fa4": (0.1034, 0.5208),
                            "fa3": (0.09809, 0.5406),
                        },
                    },
                ),
                "a bias": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "trained bias (1, 16, 2048, 2048) 4x16x2048x64": {
                            "triton": (0.224, 1.164),
                        },
                        "trained bias (4, 16, 2048, 2048) 4x16x2048x64": {
                            "triton": (0.2434, 1.247),
                        },
                        "bias (1, 16, 4096, 4096) 1x16x4096x64": {
                            "triton": (0.2359,),
                        },
                    },
                ),
                "few logits": Order(
                    ("fa4", "triton", "fa3", "cudnn"),
                    ("fa4", "triton", "fa3", "cudnn"),
                    {
                        "full 8x16x512x64": {
                            "fa4": (0.03103, 0.1067),
                            "triton": (0.03151, 0.1157),
                            "fa3": (0.0338, 0.1173),
                            "cudnn": (0.05405, 0.1201),
                        },
                    },
                ),
                "very short sequences": Order(
                    ("triton", "fa3", "fa4", "cudnn"),
                    ("triton", "cudnn", "fa3", "fa4"),
                    {
                        "full 512x12x128x64": {
                            "triton": (0.1433, 0.65),
                            "fa3": (0.1877, 0.7912),
                            "fa4": (0.2136, 0.8178),
                            "cudnn": (0.1777, 1.046),
                        },
                    },
                ),
                "short sequences": Order(
                    ("triton", "fa4", "fa3", "cudnn"),
                    ("triton", "fa3", "cudnn", "fa4"),
                    {
                        "full 64x16x256x64": {
                            "triton": (0.07664, 0.3098),
                            "fa4": (0.1025, 0.3315),
                            "fa3": (0.1106, 0.3536),
                            "cudnn": (0.107, 0.4088),
                        },
                        "causal 64x16x256x64": {
                            "triton": (0.06212, 0.2569),
                            "fa4": (0.1087, 0.3272),
                            "fa3": (0.0847, 0.328),
                            "cudnn": (0.1033, 0.3955),
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
                        "full 4x16x4096x64": {
                            "fa3": (0.5234, 1.812),
                            "fa4": (0.5093, 1.803),
                            "triton": (0.5466, 2.044),
                            "cudnn": (0.5774, 2.203),
                        },
                    },
                ),
                "head sizes up to 96": Order(
                    ("fa4", "fa3", "cudnn", "triton"),
                    ("fa3", "fa4", "cudnn", "triton"),
                    {
                        "causal 4x16x4096x96": {
                            "fa4": (0.4064, 1.439),
                            "fa3": (0.3858, 1.592),
                            "cudnn": (0.4981, 1.953),
                            "triton": (0.623, 2.431),
                        },
                    },
                ),
                "larger head sizes": Order(
                    ("fa3", "fa4", "triton"),
                    ("fa3", "fa4", "triton"),
                    {
                        "causal 4x16x4096x256": {
                            "fa3": (0.7541, 3.948),
                            "fa4": (0.7878, 5.49),
                            "triton": (1.078, 6.006),
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
                            "fa3": (0.2514, 1.045),
                            "fa4": (0.2793, 1.199),
                            "triton": (0.3348, 1.321),
                        },
                    },
                ),
                "a softcap": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "softcap 30.0, causal 4x16x4096x128": {
                            "triton": (0.7721, 2.823),
                        },
                        "window 1024, softcap 50.0, causal 2x16x4096x128": {
                            "triton": (0.2012, 0.8033),
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
                        "full 4x16x4096x128": {
                            "fa3": (0.7564, 3.046),
                            "fa4": (0.7714, 2.955),
                            "triton": (0.8184, 3.44),
                            "cudnn": (0.8341, 3.448),
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
