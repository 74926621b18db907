"""Muon for many matrices at once.

Owns the matrix optimiser of the draft. Muon replaces a momentum matrix by (nearly) the orthogonal factor of its polar
decomposition, so that every direction moves equally. Five Newton-Schulz steps do that with small matrix products: for 42
matrices some thousand kernel launches, which cost more than the draft's own arithmetic (one H100: 52 ms a step of 16384
tokens with torch.optim.Muon). Matrices of one shape are therefore stacked: four stacks, about eighty launches.
Example: q and o of 6 layers, 576 x 576, are one stack [12, 576, 576].
"""

import math

import torch

COEFFICIENTS = (3.4445, -4.775, 2.0315)


def orthogonalize(stack: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Singular values of every matrix to about 1 (0.7 to 1.2), singular vectors kept.

    Args:
        stack: [S, A, B] momentum matrices.
        steps: Newton-Schulz iterations.
    Returns:
        [S, A, B] bfloat16.
    Source: Jordan et al. (2024), "Muon: an optimizer for hidden layers in neural networks".
    """
    x = stack.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class StackedMuon:
    """Muon with Nesterov momentum 0.95 and decoupled weight decay, learning rate in AdamW's units.

    Args:
        matrices: leaf tensors [A, B] with gradients.
        lr: an update has root mean square 0.2 lr.
        weight_decay: share of a weight removed in a step, times lr.
    """

    def __init__(self, matrices: list[torch.Tensor], lr: float, weight_decay: float) -> None:
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, 0.95
        shapes = dict.fromkeys(tuple(matrix.shape) for matrix in matrices)
        self.stacks = [[matrix for matrix in matrices if tuple(matrix.shape) == shape] for shape in shapes]
        self.buffers = [torch.zeros_like(torch.stack([m.detach() for m in stack])) for stack in self.stacks]

    @torch.no_grad()
    def step(self, factor: float = 1.0) -> None:
        """Update every matrix from its gradient at `factor` of the learning rate, and drop the gradients."""
        lr = self.lr * factor
        for stack, buffer in zip(self.stacks, self.buffers, strict=True):
            gradient = torch.stack([matrix.grad for matrix in stack if matrix.grad is not None])
            buffer.lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(buffer, self.momentum)).to(buffer.dtype)
            scale = lr * 0.2 * math.sqrt(max(buffer.shape[1:]))
            torch._foreach_mul_(stack, 1 - lr * self.weight_decay)  # pyright: ignore[reportPrivateImportUsage]
            moves = list((update * -scale).unbind())
            torch._foreach_add_(stack, moves)  # pyright: ignore[reportPrivateImportUsage]
            for matrix in stack:
                matrix.grad = None
