"""The table of the Hub's API: which function answers which request."""

import re
from collections.abc import Callable
from typing import NamedTuple

from tests.support.loopback.state import State
from tests.support.loopback.wire import Answer, Request, Violation

REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
REV = r"(?P<rev>refs(?:/|%2[Ff])pr(?:/|%2[Ff])\d+|[^/]+)"
MODEL = f"/api/models/{REPO}"
Act = Callable[[State, Request], Answer]


class Route(NamedTuple):
    methods: tuple[str, ...]
    path: re.Pattern[str]
    query: frozenset[str]
    act: Act
    locked: bool


class Routes(list[Route]):
    """Filled by the decorator `on`."""

    def on(self, methods: str, path: str, query: str = "", *, locked: bool = True) -> Callable[[Act], Act]:
        """Unless not `locked`, the body has been read and the state's lock is held when the function is called."""

        def add(act: Act) -> Act:
            self.append(Route(tuple(methods.split()), re.compile(path), frozenset(query.split()), act, locked))
            return act

        return add

    def find(self, request: Request) -> Route:
        """The route of a request; its variable parts go into the request's `names`."""
        for route in self:
            match = route.path.fullmatch(request.path)
            if match and request.method in route.methods:
                request.names = {name: value for name, value in match.groupdict().items() if value is not None}
                if unknown := request.query.keys() - route.query:
                    raise Violation(400, f"unknown in the query: {', '.join(sorted(unknown))}")
                return route
        raise Violation(404, "no such route")
