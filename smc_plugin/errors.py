"""The error types every package shares.

A message has three parts: what failed, expected against got, what to do. For example:
"the request asks num_particles 12, the engine was built for at most 8: lower it, or rebuild with --particles 12".
Command lines print the message without a traceback and exit 1; serving maps the types to status codes.
"""


class SmcError(Exception):
    """Base class of every error a user can cause or must act on."""


class ConfigError(SmcError):
    """An option, environment variable or configuration value is wrong."""


class CheckpointError(SmcError):
    """A checkpoint cannot be read or does not fit its configuration."""


class EngineDirError(SmcError):
    """An engine directory is missing, damaged or does not fit this machine."""


class RequestError(SmcError):
    """One request is invalid; no other request notices."""


class QueueFullError(SmcError):
    """The bounded queue is full; the caller should retry later."""


class NumericalError(SmcError):
    """A model produced NaN or no finite logit for one request."""


class DegenerateWeightsError(SmcError):
    """A group has no particle with finite weight."""


class RankError(SmcError):
    """A tensor-parallel rank failed, or the ranks no longer agree."""
