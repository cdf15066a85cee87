"""The two ways a run ends that are not bugs. Every message is one line: what is wrong, and what to do."""


class UserError(Exception):
    """Something the user can fix. The command line prints the message and exits with 2."""


class GateError(Exception):
    """The work was done, but a promise (parity, budget) is not kept. The command line exits with 3."""
