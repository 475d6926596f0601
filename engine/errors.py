"""The two ways in which a command ends badly, and what they mean for its exit status."""


class UserError(Exception):
    """The user's input is wrong: one line says what, where, what is allowed. Exit status 2."""


class RunFailed(Exception):
    """The input was right, but the run could not go on. Exit status 1."""
