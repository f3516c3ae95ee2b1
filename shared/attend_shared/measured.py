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
                "float32": Order(("triton", "blockwise", "einsum"), ("triton", "blockwise", "einsum"), {}),
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
                    ("fa4", "triton"),
                    ("fa4", "triton"),
                    {
                        "sinks, causal 4x16x4096x64": {
                            "fa4": (0.2938, 1.055),
                            "triton": (0.3089, 1.248),
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
                "short sequences": Order(
                    ("sdpa", "triton", "fa4"),
                    ("sdpa", "triton", "fa4"),
                    {
                        "full 8x16x512x64": {
                            "sdpa": (0.04112, 0.1963),
                            "triton": (0.04291, 0.2605),
                            "fa4": (0.07321, 0.3784),
                        },
                        "full 64x16x256x64": {
                            "sdpa": (0.05389, 0.3227),
                            "triton": (0.06404, 0.3523),
                            "fa4": (0.09725, 0.3518),
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
                            "fa4": (0.271, 1.064),
                            "triton": (0.3368, 1.362),
                            "sdpa": (11.97, 29.78),
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
                    ("fa4", "triton", "sdpa"),
                    ("fa4", "triton", "sdpa"),
                    {
                        "window 1024, causal 1x16x16384x128": {
                            "fa4": (0.257, 1.037),
                            "triton": (0.2869, 1.261),
                            "sdpa": (13.29, 30.94),
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
                    ("fa4", "triton", "sdpa"),
                    ("fa4", "triton", "sdpa"),
                    {
                        "causal 4x16x4096x64": {
                            "fa4": (0.2939, 1.027),
                            "triton": (0.305, 1.237),
                            "sdpa": (0.3284, 1.27),
                        },
                        "full 4x16x4096x64": {
                            "fa4": (0.509, 1.783),
                            "triton": (0.5393, 2.164),
                            "sdpa": (0.5687, 2.109),
                        },
                    },
                ),
                "head sizes up to 128": Order(
                    ("fa4", "sdpa", "triton"),
                    ("fa4", "sdpa", "triton"),
                    {
                        "causal 4x16x4096x128": {
                            "fa4": (0.4354, 1.706),
                            "sdpa": (0.4784, 1.933),
                            "triton": (0.4551, 2.133),
                        },
                        "full 4x16x4096x128": {
                            "fa4": (0.773, 2.982),
                            "sdpa": (0.8188, 3.305),
                            "triton": (0.8196, 3.947),
                        },
                        "causal 1x32/8x8192x128": {
                            "fa4": (0.787, 3.171),
                            "sdpa": (0.9001, 3.57),
                            "triton": (0.8309, 4.235),
                        },
                        "causal 1x16x16384x128": {
                            "fa4": (1.54, 5.677),
                            "sdpa": (1.743, 6.506),
                            "triton": (1.58, 7.29),
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
                    ("triton",),
                    ("triton",),
                    {
                        "sinks, causal 4x16x4096x64": {
                            "triton": (0.3145, 1.259),
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
                "very short sequences": Order(("fa4", "fa3", "cudnn", "triton"), ("fa4", "fa3", "cudnn", "triton"), {}),
                "short sequences": Order(
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
                "head sizes up to 64": Order(
                    ("fa3", "fa4", "triton", "cudnn"),
                    ("fa3", "fa4", "triton", "cudnn"),
                    {
                        "causal 4x16x4096x64": {
                            "fa3": (0.2852, 0.9907),
                            "fa4": (0.3406, 1.062),
                            "triton": (0.3101, 1.247),
                            "cudnn": (0.3424, 1.354),
                        },
                        "full 4x16x4096x64": {
                            "fa3": (0.5206, 1.797),
                            "fa4": (0.5023, 1.783),
                            "triton": (0.5526, 2.167),
                            "cudnn": (0.5912, 2.174),
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
                            "fa3": (0.2533, 1.046),
                            "fa4": (0.2738, 1.074),
                            "triton": (0.3572, 1.451),
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
                    ("fa3", "fa4", "cudnn", "triton"),
                    ("fa3", "fa4", "cudnn", "triton"),
                    {
                        "window 1024, causal 1x16x16384x128": {
                            "fa3": (0.2499, 1.054),
                            "fa4": (0.2716, 1.064),
                            "cudnn": (0.2977, 1.29),
                            "triton": (0.2918, 1.339),
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
                    ("fa3", "fa4", "cudnn", "triton"),
                    ("fa3", "fa4", "cudnn", "triton"),
                    {
                        "causal 4x16x4096x128": {
                            "fa3": (0.4054, 1.674),
                            "fa4": (0.4533, 1.73),
                            "cudnn": (0.5013, 2.091),
                            "triton": (0.4583, 2.287),
                        },
                        "full 4x16x4096x128": {
                            "fa3": (0.7644, 3.034),
                            "fa4": (0.7701, 3.001),
                            "cudnn": (0.8443, 3.437),
                            "triton": (0.818, 4.587),
                        },
                    },
                ),
            },
        },
    ),
}
