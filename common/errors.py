"""Error for wrong input."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that says what was given, what is allowed and what to do. Scripts print it
    and exit with code 2; any other exception is a bug and keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))
