"""Errors that the user can fix. Each message is one line that says what is wrong and what to do."""


class ProfilingError(Exception):
    """A measurement cannot be made: a file or a device is missing, or a worker failed."""


class MissingPackageError(ProfilingError):
    """An optional package is not installed; the message names the extra that installs it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'optin-deploy[{extra}]'")
