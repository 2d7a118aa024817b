"""One family of errors. A message names the argument, shows its value, and says what to do."""

import re

# Of the Hub. What is shown may be a whole command line, or what an HTTP client says of its headers.
_TOKEN = re.compile(r"\bhf_(?:oauth_|jwt_)?[A-Za-z0-9]{16,}[\w.-]*")


class HfReceError(Exception):
    """Base of every error that hf_rece raises on purpose; messages show no token of the Hub."""

    def __init__(self, message: str) -> None:
        super().__init__(_TOKEN.sub("hf_***", message))


class ArgumentError(HfReceError, ValueError):
    """An argument cannot be used as given.

    Args:
        argument: name of the argument as the caller wrote it.
        value: what was passed; shown with repr, so pass a shape rather than a large tensor.
        problem: why the value cannot be used, without a final full stop.
        fix: what to pass or do instead, without a final full stop.
    """

    def __init__(self, argument: str, value: object, problem: str, fix: str) -> None:
        self.argument = argument
        super().__init__(f"{argument}={value!r}: {problem}. {fix}.")


class DataError(HfReceError, ValueError):
    """A log, a split or a history cannot be used as given.

    Args:
        source: what was read: a file, a column, an argument.
        problem: what is wrong with it, without a final full stop.
        fix: what to do about it, without a final full stop.
    """

    def __init__(self, source: str, problem: str, fix: str) -> None:
        super().__init__(f"{source}: {problem}. {fix}.")


class HubError(HfReceError, OSError):
    """The Hub did not take what was sent.

    Args:
        repo_id: of the repository.
        problem: what went wrong, without a final full stop.
        fix: what to do about it, without a final full stop.
    """

    def __init__(self, repo_id: str, problem: str, fix: str) -> None:
        super().__init__(f"{repo_id}: {problem}. {fix}.")


class WriteError(HfReceError, OSError):
    """A file or folder could not be written; what was there before is as it was.

    Args:
        path: what was to be written.
        problem: why it was not, without a final full stop.
        fix: what to do about it, without a final full stop.
    """

    def __init__(self, path: object, problem: str, fix: str) -> None:
        super().__init__(f"{path}: {problem}. {fix}.")


class NonfiniteError(HfReceError, FloatingPointError):
    """An optimiser step would have been made with NaN or infinite numbers.

    Args:
        step: number of the optimiser step, counted from 1.
        problem: what is not finite, without a final full stop.
        fix: what to do about it, without a final full stop.
    """

    def __init__(self, step: int, problem: str, fix: str) -> None:
        self.step = step
        super().__init__(f"step {step}: {problem}. {fix}.")
