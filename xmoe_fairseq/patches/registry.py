"""What a patch of stock fairseq is, and how groups of them are checked, installed and listed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol, TypeVar

from ..errors import UserError
from ..versions import FAIRSEQ_PACKAGE

F = TypeVar("F", bound=Callable[..., Any])
# The attribute of a patched function that lists its patches. `functools.wraps` copies it, so that a function is known
# as patched also if another plugin has wrapped it since.
MARK = "xmoe_patches"
# What `Replacement` expects of a name that stock fairseq does not have.
ABSENT: Any = object()


class Change(Protocol):
    """A patch or a replacement."""

    @property
    def target(self) -> str:
        """What it changes, as a dotted name."""

    @property
    def why(self) -> str:
        """What stock fairseq does, and what is done instead, in a few sentences."""

    def check(self) -> None:
        """Raises `UserError` if fairseq is not as expected; changes nothing."""

    def apply(self) -> None:
        """Changes fairseq, once."""


@dataclass(frozen=True)
class Patch:
    """A function that runs in the place of one of fairseq's, and gets that one as its first argument.

    Attributes:
        owner: the module or class that has the function.
        name: of the function.
        parameters: names of the stock function's parameters, ``*args`` and ``**kwargs`` with their stars.
        new: the function; its docstring says why it is there.
    """

    owner: Any
    name: str
    parameters: tuple[str, ...]
    new: Callable[..., Any]

    @property
    def target(self) -> str:
        """The stock function's dotted name."""
        return f"{_dotted(self.owner)}.{self.name}"

    @property
    def why(self) -> str:
        """The function's docstring, on one line."""
        return " ".join((self.new.__doc__ or "").split())

    @property
    def mark(self) -> str:
        """What a patched function carries."""
        return f"{self.target} {self.new.__module__}.{self.new.__qualname__}"

    def check(self) -> None:
        """Looks at the stock function.

        Raises:
            UserError: it is not there, or has other parameters.
        """
        stock = vars(self.owner).get(self.name)
        if stock is None:
            raise UserError(f"fairseq has no {self.target}, which xmoe_fairseq patches: {_ADVICE}")
        found = _parameters(getattr(self.owner, self.name))
        # A wrapper of another plugin may take anything and hand it on.
        takes_anything = [name.count("*") for name in found] == [1, 2]
        if found != self.parameters and not takes_anything:
            raise UserError(
                f"{self.target}({', '.join(found)}) is not the function that xmoe_fairseq patches, which has the "
                f"parameters ({', '.join(self.parameters)}): {_ADVICE}"
            )

    def apply(self) -> None:
        """Wraps what is there now, stock or another plugin's wrapper, unless this patch is in it already."""
        current = getattr(self.owner, self.name)
        if self.mark in _marks(current):
            return
        new = self.new

        @functools.wraps(current)
        def patched(*args: Any, **kwargs: Any) -> Any:
            return new(current, *args, **kwargs)

        setattr(patched, MARK, (*_marks(current), self.mark))
        static = isinstance(vars(self.owner)[self.name], staticmethod)
        setattr(self.owner, self.name, staticmethod(patched) if static else patched)


@dataclass(frozen=True)
class Replacement:
    """A value in the place of one that modules of fairseq have.

    Attributes:
        label: names the modules.
        owners: gives the modules.
        name: of the value.
        stock: what the modules have without the plugin, or `ABSENT`; None if that is not compared.
        new: what they get.
        why: what stock fairseq does, and what is done instead.
    """

    label: str
    owners: Callable[[], Iterable[Any]]
    name: str
    stock: Any
    new: Any
    why: str

    @property
    def target(self) -> str:
        """The modules and the name."""
        return f"{self.label}.{self.name}"

    def check(self) -> None:
        """Looks at the stock values.

        Raises:
            UserError: a module has another one.
        """
        for owner in self.owners():
            current = vars(owner).get(self.name, ABSENT)
            if self.stock is not None and current is not self.stock and current is not self.new:
                raise UserError(
                    f"{_dotted(owner)}.{self.name} is {current!r}, not what xmoe_fairseq replaces: another plugin has "
                    f"changed it, or {_ADVICE}"
                )

    def apply(self) -> None:
        """Puts the new value into each module."""
        for owner in self.owners():
            setattr(owner, self.name, self.new)


@dataclass
class Group:
    """Changes that only make sense together: all of them are installed, or none.

    Attributes:
        title: what they are about.
        when: when they are installed.
        changes: in the order in which they are declared; of two of the same function, the later one runs first.
    """

    title: str
    when: str = "on import"
    changes: list[Change] = field(default_factory=list)

    def patch(self, owner: Any, name: str, parameters: str) -> Callable[[F], F]:
        """Declares the decorated function as a `Patch`.

        Args:
            owner: the module or class of the stock function.
            name: of the stock function.
            parameters: names of its parameters, with spaces between them.
        """

        def declare(new: F) -> F:
            self.changes.append(Patch(owner, name, tuple(parameters.split()), new))
            return new

        return declare

    def replace(self, owner: Any, name: str, stock: Any, new: Any, why: str) -> None:
        """Declares a `Replacement` in one module, ``owner``."""
        self.changes.append(Replacement(_dotted(owner), lambda: (owner,), name, stock, new, why))


def install(*groups: Group) -> None:
    """Installs groups of patches, whole; those that are installed stay as they are.

    Raises:
        UserError: fairseq is not as one of them expects, and nothing was changed.
    """
    changes = [change for group in groups for change in group.changes]
    for change in changes:
        change.check()
    for change in changes:
        change.apply()


def page(groups: Iterable[Group]) -> str:
    """Lists groups as Markdown."""
    lines = []
    for group in groups:
        lines += ["", f"## {group.title}", "", f"Installed {group.when}.", "", "| patched | why |", "|---|---|"]
        lines += [f"| `{change.target}` | {change.why} |" for change in group.changes]
    return "\n".join(lines) + "\n"


_ADVICE = f"pip install {FAIRSEQ_PACKAGE}"


def _dotted(owner: Any) -> str:
    return owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"


def _marks(function: Any) -> tuple[str, ...]:
    marks: tuple[str, ...] = getattr(function, MARK, ())
    return marks


def _parameters(function: Any) -> tuple[str, ...]:
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return tuple(stars.get(one.kind, "") + one.name for one in inspect.signature(function).parameters.values())
