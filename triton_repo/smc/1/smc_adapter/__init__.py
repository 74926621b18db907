"""The part of the serving path that runs inside the Triton Inference Server: numpy and pyzmq, nothing else.

All four models of the repository import it from here; the executor's side imports `protocol` from here too, so that
there is one copy of the message schema.
"""
