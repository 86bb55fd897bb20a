"""Every error that seqfraud raises on purpose.

A message names the field, the value seen, what was expected and, where there is one, the next step.
Commands turn a `SeqfraudError` into one line and exit code 2; anything else is a bug and keeps its traceback.
"""


class SeqfraudError(Exception):
    """Root of the tree: what a user can cause and mend."""


class ConfigError(SeqfraudError):
    """A configuration or a command's setting cannot be used."""


class DataError(SeqfraudError):
    """A file of transactions cannot be read as the configuration says."""


class BundleError(SeqfraudError):
    """A bundle is incomplete, changed, of another format, or not what its manifest says."""


class ParityError(BundleError):
    """Exported graphs do not compute what the trained model computes; the message has the figure."""


class RegistryError(SeqfraudError):
    """A registry of models cannot do what it is asked; nothing was changed by it."""


class RunError(SeqfraudError):
    """A run folder lacks something or does not fit what is asked of it."""


class JournalError(SeqfraudError):
    """The journal cannot store or read something now; nothing was changed by it."""


class ModelError(SeqfraudError):
    """The graphs cannot answer now: one failed, or gave no probability; nothing was changed by it."""


class RequestError(SeqfraudError):
    """A request that the service refuses; nothing was changed by it.

    `status` is the HTTP status, `code` a stable word for programs, `field` the offending field or "", `retry_after` the
    seconds after which asking again makes sense, where that is known.
    """

    def __init__(self, status: int, code: str, message: str, field: str = "", retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.status = status
        self.code = code
        self.message = message
        self.field = field
