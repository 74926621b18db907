"""A whole forward pass of few rows as one launch: the weights stream through shared memory and hardly ever wait.

A launch for each product loses about 3 µs where one ends and the next begins, while the memory idles. Here one program stays
on each multiprocessor for all layers. Its weights are stored in the order in which it needs them (`weights`), and one of its
warps asks for the next 208 kB all the time (`products`; less on a GPU with less shared memory), whatever the others wait for:
the rows that a product multiplies come from all programs. They are handed over without a barrier (`exchange`). The steps
of a layer:

    qkv         columns spread over the programs, all of the inner dimension in one
    attention   a (sequence, KV head, part of its query heads) a program; keys and values go to their pages
    o           plus the residual
    gate/up     silu(gate) * up
    down        plus the residual

Within a program the inner dimension of a product is spread over 8 warps, and their sums are added in order: results do
not depend on timing. Norms are carried as in `matmul`: y times the next norm's weight, and sums of y² for the product to
divide by at its end.

All programs must run at the same time, one on each multiprocessor: each waits for values of the others. A launch on a stream
gets that where everything else that holds multiprocessors ends by itself: kernels before it, and other processes' without MPS,
since the GPU gives them turns. Two passes that wait on two streams of a process at once could each hold a part of the
multiprocessors for ever; the executor has one stream. Under MPS nothing keeps another process from that, so the engine takes
steps there. In a MIG instance the number of multiprocessors is the instance's, and they are its own.

Written in Gluon, Triton's lower level, because what lies where in shared memory is the point: what a thread loads from a
stage is its part of a matrix operand, 16 bytes at a time. There is no interpreter for Gluon: without a GPU the kernel can be
compiled, and the order of the weights is tested against torch.

Example: Llama-1B, 8 rows, 132 multiprocessors: program 0 takes 58 stages of 16 kB a layer, 6 of qkv (3 times 8 columns), 4 of o
(16 columns), 32 of gate/up (8 times 8 and 8 columns) and 16 of down (16 columns).
"""

from smc_plugin.kernels.whole_pass.run import MAX_CONTEXT, MAX_ROWS, WholePass
from smc_plugin.kernels.whole_pass.shape import DecoderShape

__all__ = ["MAX_CONTEXT", "MAX_ROWS", "DecoderShape", "WholePass"]
