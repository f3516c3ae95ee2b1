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
                            "triton": (3.506, 15.9),
                            "einsum": (6.956, 18.87),
                            "blockwise": (9.024, 92.81),
                        },
                    },
                ),
                "few queries": Order(
                    ("triton", "fa4", "sdpa", "flex"),
                    ("triton", "fa4", "sdpa", "flex"),
                    {
                        "decoding 8x32/8x1:32768x128": {
                            "triton": (0.352,),
                            "fa4": (0.3451,),
                            "sdpa": (0.3439,),
                            "flex": (1.131,),
                        },
                        "key lengths, decoding 8x32/8x1:32768x128": {
                            "triton": (0.2127,),
                            "fa4": (1.997,),
                            "sdpa": (2.021,),
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
                            "triton": (0.5754, 1.84),
                            "sdpa": (1.071, 3.601),
                        },
                        "padded keys 4x16x4096x64": {
                            "triton": (0.4147, 1.487),
                            "sdpa": (1.068, 3.619),
                        },
                        "padded keys 64x12x512x64": {
                            "triton": (0.1407, 0.5019),
                            "sdpa": (0.3921, 1.196),
                        },
                    },
                ),
                "lengths": Order(
                    ("triton", "sdpa"),
                    ("triton", "sdpa"),
                    {
                        "key lengths, causal 4x16x4096x64": {
                            "triton": (0.255, 1.006),
                            "sdpa": (1.672, 4.461),
                        },
                    },
                ),
                "sinks": Order(
                    ("fa4", "triton", "flex"),
                    ("fa4", "triton", "flex"),
                    {
                        "sinks, causal 4x16x4096x64": {
                            "fa4": (0.2946, 1.048),
                            "triton": (0.3545, 1.292),
                            "flex": (0.4374, 1.766),
                        },
                    },
                ),
                "lse": Order(
                    ("fa4", "triton"),
                    ("fa4", "triton"),
                    {
                        "with lse, causal 4x16x4096x128": {
                            "fa4": (0.4297, 1.689),
                            "triton": (0.4909, 2.2),
                        },
                    },
                ),
                "an offset": Order(
                    ("triton", "flex", "sdpa", "fa4"),
                    ("triton", "flex", "fa4", "sdpa"),
                    {
                        "causal 1x32/8x512:8192x128": {
                            "triton": (0.1028, 0.5371),
                            "flex": (0.2195, 0.7968),
                            "sdpa": (0.2696, 0.9391),
                            "fa4": (0.2596, 0.9619),
                        },
                    },
                ),
                "short sequences": Order(
                    ("sdpa", "triton", "fa4", "flex"),
                    ("sdpa", "triton", "fa4", "flex"),
                    {
                        "full 8x16x512x64": {
                            "sdpa": (0.0417, 0.1924),
                            "triton": (0.04275, 0.3303),
                            "fa4": (0.2251, 0.8031),
                            "flex": (0.2432, 0.8027),
                        },
                        "full 64x16x256x64": {
                            "sdpa": (0.05419, 0.322),
                            "triton": (0.06386, 0.342),
                            "fa4": (0.2916, 0.9399),
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
                            "sdpa": (0.8486, 4.483),
                            "fa4": (0.7703, 5.268),
                            "triton": (1.06, 5.93),
                        },
                    },
                ),
                "dropout": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "dropout 0.1, causal 4x16x4096x64": {
                            "triton": (0.6405, 2.275),
                        },
                        "dropout 0.1, causal 4x16x4096x128": {
                            "triton": (0.9597, 3.549),
                        },
                    },
                ),
                "a bias": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "trained bias (1, 16, 2048, 2048) 4x16x2048x64": {
                            "triton": (0.2232, 1.406),
                        },
                        "trained bias (4, 16, 2048, 2048) 4x16x2048x64": {
                            "triton": (0.2394, 1.658),
                        },
                        "bias (1, 16, 4096, 4096) 1x16x4096x64": {
                            "triton": (0.2347,),
                        },
                    },
                ),
                "segment ids": Order(
                    ("triton", "fa4", "sdpa"),
                    ("triton", "fa4", "sdpa"),
                    {
                        "8 documents, causal 1x16x16384x128": {
                            "triton": (0.3355, 1.397),
                            "fa4": (0.5524, 1.6),
                            "sdpa": (12.02, 29.74),
                        },
                    },
                ),
                "a softcap": Order(
                    ("triton", "fa4", "flex"),
                    ("triton", "fa4", "flex"),
                    {
                        "softcap 30.0, causal 4x16x4096x128": {
                            "triton": (0.7159, 2.753),
                            "fa4": (0.9782, 2.927),
                            "flex": (1.507, 5.283),
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
                            "fa4": (0.2537, 1.027),
                            "triton": (0.3237, 1.292),
                            "flex": (0.4251, 1.52),
                            "sdpa": (13.26, 30.97),
                        },
                    },
                ),
                "a key mask, causal": Order(
                    ("triton", "sdpa"),
                    ("triton", "sdpa"),
                    {
                        "padded keys, causal 4x16x4096x64": {
                            "triton": (0.2907, 1.038),
                            "sdpa": (1.628, 4.375),
                        },
                    },
                ),
                "very short sequences": Order(
                    ("triton", "sdpa", "fa4"),
                    ("sdpa", "triton", "fa4"),
                    {
                        "full 512x12x128x64": {
                            "triton": (0.1395, 0.6275),
                            "sdpa": (0.1342, 0.8027),
                            "fa4": (0.3166, 0.8901),
                        },
                    },
                ),
                "head sizes up to 64": Order(
                    ("fa4", "sdpa", "triton", "flex"),
                    ("fa4", "sdpa", "triton", "flex"),
                    {
                        "causal 4x16x4096x64": {
                            "fa4": (0.2931, 1.017),
                            "sdpa": (0.3293, 1.273),
                            "triton": (0.352, 1.279),
                            "flex": (0.4188, 1.717),
                        },
                        "full 4x16x4096x64": {
                            "fa4": (0.5093, 1.778),
                            "sdpa": (0.5741, 2.127),
                            "triton": (0.6074, 2.246),
                        },
                    },
                ),
                "head sizes up to 128": Order(
                    ("fa4", "sdpa", "triton", "flex"),
                    ("fa4", "sdpa", "triton", "flex"),
                    {
                        "causal 4x16x4096x128": {
                            "fa4": (0.4269, 1.68),
                            "sdpa": (0.4703, 1.906),
                            "triton": (0.4868, 2.18),
                        },
                        "full 4x16x4096x128": {
                            "fa4": (0.7661, 2.941),
                            "sdpa": (0.8088, 3.268),
                            "triton": (0.8276, 3.97),
                            "flex": (1.146, 4.47),
                        },
                        "causal 1x32/8x8192x128": {
                            "fa4": (0.7745, 3.126),
                            "sdpa": (0.8891, 3.533),
                            "triton": (0.8612, 4.295),
                            "flex": (1.416, 5.298),
                        },
                        "causal 1x16x16384x128": {
                            "fa4": (1.51, 5.588),
                            "sdpa": (1.735, 6.451),
                            "triton": (1.564, 7.337),
                        },
                        "causal 4x16x4096x96": {
                            "fa4": (0.3738, 1.415),
                            "sdpa": (0.4738, 1.852),
                            "triton": (0.6, 2.302),
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
                            "triton": (0.3559,),
                            "fa4": (0.656,),
                            "fa3": (0.6568,),
                            "cudnn": (0.767,),
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
                            "triton": (0.356, 1.304),
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
                            "triton": (0.2262, 1.44),
                        },
                    },
                ),
                "very short sequences": Order(("fa4", "fa3", "cudnn", "triton"), ("fa4", "fa3", "cudnn", "triton"), {}),
                "short sequences": Order(
                    ("fa4", "fa3", "triton", "cudnn"),
                    ("fa4", "fa3", "triton", "cudnn"),
                    {
                        "full 8x16x512x64": {
                            "fa4": (0.03017, 0.1067),
                            "fa3": (0.03181, 0.1131),
                            "triton": (0.03228, 0.1211),
                            "cudnn": (0.03888, 0.1134),
                        },
                    },
                ),
                "head sizes up to 64": Order(
                    ("fa3", "fa4", "cudnn", "triton"),
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
                "larger head sizes": Order(("fa4", "fa3", "triton"), ("fa4", "fa3", "triton"), {}),
                "dropout": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "dropout 0.1, causal 4x16x4096x64": {
                            "triton": (0.6317, 2.307),
                        },
                    },
                ),
                "segment ids": Order(
                    ("fa4", "triton"),
                    ("fa4", "triton"),
                    {
                        "8 documents, causal 1x16x16384x128": {
                            "fa4": (0.3143, 1.155),
                            "triton": (0.3556, 1.47),
                        },
                    },
                ),
                "a softcap": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "softcap 30.0, causal 4x16x4096x128": {
                            "triton": (0.7542, 2.88),
                        },
                    },
                ),
                "a window": Order(
                    ("fa3", "fa4", "cudnn", "triton"),
                    ("fa3", "fa4", "cudnn", "triton"),
                    {
                        "window 1024, causal 1x16x16384x128": {
                            "fa3": (0.2455, 1.046),
                            "fa4": (0.2735, 1.045),
                            "cudnn": (0.2968, 1.311),
                            "triton": (0.3387, 1.363),
                        },
                    },
                ),
                "a key mask, causal": Order(
                    ("triton",),
                    ("triton",),
                    {
                        "padded keys, causal 4x16x4096x64": {
                            "triton": (0.2949, 1.073),
                        },
                    },
                ),
                "head sizes up to 128": Order(
                    ("fa3", "fa4", "cudnn", "triton"),
                    ("fa3", "fa4", "cudnn", "triton"),
                    {
                        "causal 4x16x4096x128": {
                            "fa3": (0.3972, 1.648),
                            "fa4": (0.4479, 1.7),
                            "cudnn": (0.4951, 2.05),
                            "triton": (0.4926, 2.338),
                        },
                    },
                ),
            },
        },
    ),
}
