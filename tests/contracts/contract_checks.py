"""How contract tests look at a library's functions."""

import inspect


def parameters(function) -> list[str]:
    """Names of what a function takes, in order, without `self`."""
    return [name for name in inspect.signature(function).parameters if name != "self"]


def takes(function, *names: str) -> None:
    """Fails unless `function` has parameters of these names, or any keywords."""
    found = inspect.signature(function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in found.values()):
        missing = [name for name in names if name not in found]
        assert not missing, f"no parameter {missing} in {inspect.signature(function)}"


def names_in(function) -> set[str]:
    """Attributes and globals that a function's code reads, writes or calls."""
    return set(inspect.unwrap(function).__code__.co_names)
