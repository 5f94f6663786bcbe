"""The one error that stands for a user's mistake, and checks that several settings share."""

from collections.abc import Sequence


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that says what was given, what is allowed and what to do. Scripts print it
    and exit with code 2; any other exception is a bug and keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


def check_list(name: str, values: Sequence[object]) -> None:
    """Refuse a setting that takes several values where it has none, or one of them twice.

    Raises:
        InputError: it has.
    """
    if not values or len(set(values)) < len(values):
        raise InputError(f"{name} is {list(values)}; give one or more values, each once")


def check_num_tokens(numbers: Sequence[int]) -> None:
    """Refuse a list of k that is empty, names one twice, or has one below 1.

    Raises:
        InputError: it does.
    """
    check_list("num_tokens", numbers)
    if min(numbers) < 1:
        raise InputError(f"num_tokens has {min(numbers)}; it must be at least 1")
