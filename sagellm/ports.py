"""The ports of a SAGE installation: one table, so that none is written anywhere else. A leaf."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from attrs import field, fields, frozen

from sagellm.errors import UserError

ENVIRONMENT = "SAGELLM_PORT_"


def port(low: int = 1):
    """A validator of attrs: a TCP port; 0, where it is let, takes one that is free."""

    def check(instance: object, attribute, value: object) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= 65535:
            raise UserError(f"{attribute.name} is {value!r}; accepted: a port from {low} to 65535")

    return check


def _port(default: int):
    return field(default=default, validator=port())


@frozen(kw_only=True)
class SagePorts:
    """Ports by what listens there; the second of a pair is for a second one on the same machine."""

    gateway: int = _port(8889)
    llm: int = _port(8001)
    llm_second: int = _port(8002)
    serve: int = _port(8901)
    serve_second: int = _port(8903)
    engine: int = _port(8902)
    engine_second: int = _port(8904)
    embedding: int = _port(8090)
    embedding_second: int = _port(8091)

    @classmethod
    def load(cls, env: Mapping[str, str]) -> Self:
        """The defaults, but for those that `SAGELLM_PORT_<NAME>` in `env` says otherwise. Raises UserError."""
        given = {}
        for name in (a.name for a in fields(cls)):
            if (variable := ENVIRONMENT + name.upper()) in env:
                text = env[variable]
                if not text.isdecimal() or not 1 <= int(text) <= 65535:
                    raise UserError(f"{variable} is {text!r}; accepted: a port from 1 to 65535")
                given[name] = int(text)
        return cls(**given)
