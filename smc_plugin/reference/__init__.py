"""Plain torch versions of every kernel: the definition on any machine, the run time where there is no GPU.

Modules: random (Philox streams), sampling, weights, resample, pages, attention. Shapes use G requests (groups), N
particles, K draft tokens, R = rows, V = vocabulary. Nothing here looks at a value on the host, so that the same calls can
be captured in a CUDA graph.
"""
