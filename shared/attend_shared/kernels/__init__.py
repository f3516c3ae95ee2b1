"""Kernels in Triton that no framework owns, and `plan`, which says what a call launches.

`attention` has those that compute it, `gradients` the way back, `sinks` what makes dsinks of half precision, `bounds`
those that find out what need not be computed, and `tiles`, `visits` and `dropout` what these are put together from.
`hopper` and `narrow` forward, `queries` and `keys` back are in Gluon, Triton's lower language, for GPUs of compute
capability 9.0; `groups` is what they share. All of these import triton, and so are imported by none but what launches
them.

`plan` is made of `launch`, a launch as data; `sizes`, the blocks and thresholds that were measured; `arguments`, what
launches have in common; `gluon_plan`, the launches of the kernels in Gluon; and `of_sinks`, those of `sinks`. They are
plain Python.
"""
