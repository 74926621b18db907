"""The look-up of token embeddings against the torch reference, under the interpreter."""

import pytest
import torch

from smc_plugin.kernels import embedding as kernels
from smc_plugin.reference import embedding as reference


@pytest.mark.parametrize(("rows", "width"), [(1, 8), (5, 100), (3, 1536), (2, 2048)])
def test_look_up(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    table = torch.randn(17, width, generator=generator)
    tokens = torch.randint(0, 17, (rows,), generator=generator)
    assert torch.equal(kernels.embed(tokens, table), reference.embed(tokens, table))
