"""Errors that a user can mend; the command line prints them in one line, without a traceback."""

__all__ = ["BackendUnavailableError", "ConfigError", "DataError", "RunError", "TopmassError", "UnsupportedModelError"]


class TopmassError(Exception):
    """Base of every error that names its own remedy."""


class ConfigError(TopmassError, ValueError):
    """A setting is out of range or contradicts another."""


class DataError(TopmassError, ValueError):
    """An input (text, prompt, file) cannot be used as it is."""


class UnsupportedModelError(TopmassError, TypeError):
    """The model, or the way it is called, is one whose attention topmass cannot replace exactly."""


class BackendUnavailableError(TopmassError, RuntimeError):
    """No kernel backend can run this call; the message lists each reason."""


class RunError(TopmassError, RuntimeError):
    """A run directory cannot be read, written or resumed."""
