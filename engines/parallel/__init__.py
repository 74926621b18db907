"""Tensor parallelism: ranks under mpirun, what they say to each other, and how they stay together."""
