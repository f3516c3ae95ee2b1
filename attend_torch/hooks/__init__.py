"""Attention for hosts that take it as a function. One module a host; each says what its host passes and expects."""
