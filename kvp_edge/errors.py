"""What can go wrong, as exceptions whose message is a sentence for the person who reads it."""


class KVCacheError(RuntimeError):
    """The cache could not be read, thinned or trusted; the message says what to do."""


class InUseError(RuntimeError):
    """The model serves another call; nothing was changed."""


class UnsupportedModelError(ValueError):
    """The model file cannot be read, or its cache cannot be bounded safely."""


class BudgetError(ValueError):
    """The numbers for the bounded cache (budget, sinks, recent...) do not fit together."""


class ContextLengthError(ValueError):
    """The text is longer than the logical context ``n_ctx``."""


class SessionError(ValueError):
    """A session file cannot be written or read, or does not belong to this model and settings."""


class TraceError(ValueError):
    """Traces that are damaged, incomplete or foreign, or that cannot be made of what was given."""


class PolicyFileError(ValueError):
    """The policy file cannot be read, or belongs to another model."""


class TrainingError(ValueError):
    """Traces, model, settings or folder do not allow (more) training; what was done is kept."""
