"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class UserError(ValueError):
    """An input that cannot be used.

    The message is one sentence for the person who gave the input: what was expected, what came, and what
    to do. The command line prints it without a traceback and exits with code 2.
    """
