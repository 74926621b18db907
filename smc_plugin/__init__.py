"""Kernels of the SMC round, each beside its plain torch reference."""
