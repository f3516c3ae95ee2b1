"""Kernels in Triton that no framework owns: `attention` has the sources, `plan` says what a call launches.

`attention` imports triton, and so is imported by none but what launches it.
"""
