"""A sum over ranks, the residual stream and its norm in one launch: ranks hand rows to one another in peer-to-peer memory.

A program has a row. It stores its rank's part where the other ranks read, waits for theirs, adds all in the order of the ranks,
adds the residual and norms the result. Of two ways to exchange, one-shot sends the whole row to every rank, one hop; two-shot
sends each rank a share of the columns, which that rank sums and sends to all: two hops, fewer bytes. Example, 72 rows of 8192
bfloat16 columns over four ranks: each rank sends 3.5 MB in one shot, 1.8 MB in two.

A value says itself whether it is there: an inbox holds a pattern that no sent value has (all bits set, a NaN), and who needs a
value loads it again for as long as it is that pattern. So there is no flag, no fence and no barrier.

Each row has three sides in an inbox, and its own count of calls: call c of a row uses side c % 3, and unsets side (c - 1) % 3
of its rank's inbox for call c + 2. All calls follow one another on one stream, each kernel waits for the end of those before
it, and a program ends only after it got its row's call c from every rank, all of it. Hence, for any two ranks A and B and any
row:

- When A unsets a side in call c, nobody uses it: A has read all of call c - 1, so all that was sent for it has arrived.
- When B sends call c + 2 into that side of A's inbox, B has ended call c + 1 and so got A's part of it, which A sent after
  the end of its call c. So A's stores of call c, which unset the side, are older than B's.

Older needs no fence here: a call unsets and sends in different sides, and between the unset of one call and the send that could
meet it lie the ends of two kernels on each of the two GPUs. (A draft pass in one launch has no such ends, and fences.)

That holds row by row, however far the programs of a call are apart, and whatever other rows the calls between had.
"""

from smc_plugin.kernels.rank_sum.run import MAX_ROWS, WAYS, RankSum, Way

__all__ = ["MAX_ROWS", "WAYS", "RankSum", "Way"]
