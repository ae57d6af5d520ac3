"""Tell a person that an input is wrong, or that a result may not mean what it seems to."""


class UserError(ValueError):
    """An input that cannot be used.

    The message is one sentence for the person who gave the input: what was expected, what came, and what
    to do. The command line prints it without a traceback and exits with code 2.
    """


class Caution(UserWarning):
    """A result that was computed as asked, but may not mean what its reader expects.

    The message is one sentence: what was found, and what to do. The command line prints it without a traceback.
    """
