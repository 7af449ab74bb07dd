"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """A problem that the user can fix; the command line prints its message without a traceback."""
