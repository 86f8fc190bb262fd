"""The one exception whose message is meant for the person at the keyboard."""


class JaxdiffError(ValueError):
    """A wrong option, file or number, told in one sentence that also says what would be right.

    The scripts print the message without a traceback and leave with a non-zero status.
    """
