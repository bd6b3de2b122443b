"""What can go wrong, as exceptions whose message is a sentence for the person who reads it.

Every class is a ``KVPError``, and a ValueError if something given was wrong or a RuntimeError if
something failed. Besides these, a value of the wrong type is a TypeError, a file of the system's
an OSError, and a package that is missing an ImportError, as usual in Python.
"""


class KVPError(Exception):
    """The base class of all errors of kvp_edge."""


class KVCacheError(KVPError, RuntimeError):
    """The cache could not be read, thinned or trusted; the message says what to do."""


class InUseError(KVPError, RuntimeError):
    """The model serves another call; nothing was changed."""


class ClosedError(KVPError, RuntimeError):
    """The model was closed."""


class OptionError(KVPError, ValueError):
    """An option has a value that is not one of its choices."""


class BudgetError(KVPError, ValueError):
    """The numbers for the bounded cache (budget, sinks, recent...) do not fit together."""


class UnsupportedModelError(KVPError, ValueError):
    """The model file cannot be read, or its cache cannot be bounded safely."""


class ContextLengthError(KVPError, ValueError):
    """The text is longer than the logical context ``n_ctx``."""


class SessionError(KVPError, ValueError):
    """A session cannot be written or read, or does not belong to this model and settings."""


class PolicyError(KVPError, ValueError):
    """A policy does not exist, does not work here, or returns invalid scores."""


class PolicyFileError(PolicyError):
    """The policy file cannot be read, or belongs to another model."""


class TraceError(KVPError, ValueError):
    """Traces are damaged, incomplete or from another model, or cannot be made from the sources."""


class TrainingError(KVPError, ValueError):
    """Traces, model, settings or folder do not allow (more) training; what was done is kept."""


class RecordError(KVPError, ValueError):
    """A record of an evaluation is damaged, or records do not fit together."""
