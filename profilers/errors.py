"""Errors that the user of this package can fix; each message is one line saying what is wrong and what to do."""


class ProfilingError(Exception):
    """A measurement cannot be made as asked (a missing file, a device that is absent, a worker that failed)."""


class MissingPackageError(ProfilingError):
    """An optional package is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: pip install 'optin-deploy[{extra}]'")
