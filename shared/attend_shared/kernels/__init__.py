"""Kernels in Triton that no framework owns, and `plan`, which says what a call launches.

`attention` has those that compute it, `gradients` the way back, `bounds` those that find out what of both need not be
computed, and `tiles`, `visits` and `dropout` what these are put together from. `hopper`, `narrow` and `keys` are in
Gluon, Triton's lower language, for GPUs of compute capability 9.0. All of these import triton, and so are imported by
none but what launches them.
"""
