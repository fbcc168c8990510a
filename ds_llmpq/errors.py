"""The one exception for a user's mistake: its message is the whole output, without a traceback."""


class UserError(Exception):
    """What the user gave cannot be used. The message is one sentence: the value, the bound, the remedy."""

    exit_code = 1


class InfeasibleError(UserError):
    """No plan exists. The message names the binding constraint and the smallest change that would make it feasible."""

    exit_code = 2


class Interrupted(UserError):
    """The user ended the run."""

    exit_code = 130
