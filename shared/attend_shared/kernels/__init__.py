"""Kernels in Triton that no framework owns, and `plan`, which says what a call launches.

`attention` has those that compute it, `bounds` those that find out what of it need not be computed, `hopper` and
`narrow` what is in Gluon, Triton's lower language, for GPUs of compute capability 9.0. All four import triton, and so
are imported by none but what launches them.
"""
