"""The errors and warnings that numerics of this project raise."""


class ConvergenceWarning(UserWarning):
    """A budget ran out before the tolerance was reached; the result says how far it got."""


class NonDeterministicError(ValueError):
    """The loss would change between two evaluations at the same weights; the message names why."""


class NonFiniteError(ArithmeticError):
    """A NaN or an infinity arose; the message names where."""


class RankError(RuntimeError):
    """Another process of the group failed, so this one cannot go on; the message says with what."""


class SecondDerivativeError(RuntimeError):
    """A layer's gradient cannot be differentiated again; the message says which and what to do."""
