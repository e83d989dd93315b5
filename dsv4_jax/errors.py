"""Every error a user can cause: one tree, one line each, one exit code each.

The exit codes follow sysexits.h where it has a word for the case.
"""

EXIT_UNEXPECTED = 1
EXIT_USAGE = 2
EXIT_BAD_DATA = 65
EXIT_NO_INPUT = 66
EXIT_UNAVAILABLE = 69
EXIT_NUMERIC = 70
EXIT_CANNOT_WRITE = 73
EXIT_TRY_AGAIN = 75
EXIT_NO_MEMORY = 77
EXIT_INTERRUPTED = 130


class DSV4Error(Exception):
    """A mistake that has a name: `message` says what was found and where, `hint` how to mend it."""

    exit_code = EXIT_UNEXPECTED

    def __init__(self, message: str, *, hint: str = "", exit_code: int | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint
        if exit_code is not None:
            self.exit_code = exit_code

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class CheckpointError(DSV4Error):
    """A checkpoint folder that is absent (66) or does not hold what it should (65)."""

    exit_code = EXIT_BAD_DATA


class ConfigError(DSV4Error):
    """A config.json that does not describe a DeepSeek-V4 model."""

    exit_code = EXIT_BAD_DATA


class TokenizerError(DSV4Error):
    """A tokenizer.json that is absent, damaged or of another model."""

    exit_code = EXIT_BAD_DATA


class RequestError(DSV4Error):
    """A prompt or a sampling parameter that cannot be served."""

    exit_code = EXIT_USAGE


class MemoryPlanError(DSV4Error):
    """A model that does not fit the device (77) or a mesh that does not divide it (2)."""

    exit_code = EXIT_NO_MEMORY


class DistributedError(DSV4Error):
    """Processes that cannot reach one another or do not agree."""

    exit_code = EXIT_UNAVAILABLE


class NumericError(DSV4Error):
    """A value that is not a finite number where one must be."""

    exit_code = EXIT_NUMERIC


class OutputError(DSV4Error):
    """A result that cannot be written (73), or was written in part and can be resumed (75)."""

    exit_code = EXIT_CANNOT_WRITE
