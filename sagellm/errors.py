"""The errors a user can cause. Each is one line: what, which value, what is accepted."""


class UserError(ValueError):
    """Bad input. The command line prints it as one line and exits with status 2."""


class QueueFull(UserError):
    """No room for another request now; later there may be."""


class RankLost(Exception):
    """A rank of the engine ended, or the ranks are out of step: the core is lost with it."""


def unknown(what: str, value: object, accepted: object) -> UserError:
    """`unknown pass 'foo'; accepted: a, b, c` (accepted may be any iterable of names)."""
    names = accepted if isinstance(accepted, str) else ", ".join(str(name) for name in accepted)
    return UserError(f"unknown {what} {str(value)!r}; accepted: {names or 'none'}")
