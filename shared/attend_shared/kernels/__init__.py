"""Kernels in Triton that no framework owns: `attention` has the sources, `plan` says what a call launches.

`hopper` has what is in Gluon, Triton's lower language, for GPUs of compute capability 9.0. Both import triton, and so
are imported by none but what launches them.
"""
