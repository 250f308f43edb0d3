"""A jinja2 sandbox in which foreign code costs no more memory than it is allowed: everything a template makes
is charged to a budget before it is made.

jinja2's own sandbox keeps templates away from files and internals, but one line can double a text or pad it
to gigabytes. What templates of models use is allowed; the lists are those of llama.cpp's template engine
(common/jinja/value.cpp) and of transformers, and a little more. Time is limited in lines of compiled code;
what one line can do is bounded by the budget.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, ItemsView, Iterable, Iterator, KeysView, ValuesView
from contextlib import contextmanager
from types import BuiltinMethodType, FrameType
from typing import Any, Final

from jinja2 import TemplateError as JinjaError
from jinja2 import Undefined, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import loopcontrols
from jinja2.filters import do_indent
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_BYTES: Final = 128_000_000
"""All that one rendering may make, roughly in bytes, also what it throws away."""
MAX_STEPS: Final = 200_000
"""Lines of compiled template; the longest history that fits a context takes a few thousand."""

_OBJECT_BYTES: Final = 64  # a small Python object and the reference to it
_REFERENCE_BYTES: Final = 8
_ELEMENT_BYTES: Final = 256  # what is looked at costs time as well
_ESCAPED: Final = 6  # characters that one character can become, such as \u0000
_MAX_INTEGER_BITS: Final = 4096
_MAX_ARGUMENT: Final = 10_000
"""Numbers given to filters: widths, precisions, lengths."""

_VIEWS: Final = (KeysView, ValuesView, ItemsView)  # of dictionaries

_TEXT_FILTERS: Final = frozenset(
    {"capitalize", "e", "escape", "lower", "safe", "title", "trim", "truncate", "upper", "urlencode"}
)
"""Turn one value into a text that is not much longer."""
_COPYING_FILTERS: Final = frozenset({"dictsort", "items", "list", "reverse", "sort"})
"""Make a list of what they get."""
_OTHER_FILTERS: Final = frozenset(
    {"abs", "attr", "count", "d", "default", "first", "float", "int", "last", "length", "map", "max", "min"}
    | {"reject", "rejectattr", "round", "select", "selectattr", "unique"}
)
"""Make nothing, or one element at a time."""

_TEXT_METHODS: Final = frozenset(
    {"capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii"}
    | {"isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower"}
    | {"lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition"}
    | {"rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper"}
)
_METHODS: Final[tuple[tuple[type | tuple[type, ...], frozenset[str]], ...]] = (
    (str, _TEXT_METHODS),
    (dict, frozenset({"get", "items", "keys", "values"})),
    ((list, tuple), frozenset({"count", "index"})),
    ((int, float, complex, bytes, *_VIEWS), frozenset()),
)
"""By type, the methods that a template may call."""


class LimitExceeded(JinjaError):
    """The template wants more than a rendering may have."""


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox of one template. Renders one conversation at a time."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[loopcontrols],
            undefined=Undefined,
            autoescape=False,  # the output is a prompt, not HTML
            finalize=self._checked,
        )
        self.code_generator_class = _ChargingCode
        # jinja2 joins the parts of a block or a macro with this; it is a class attribute for everybody.
        self.concat = self._concatenated  # type: ignore[method-assign] # typed as a method of str
        self._left = MAX_BYTES
        builtin = dict(self.filters)
        self.filters.clear()
        for name in _TEXT_FILTERS | _COPYING_FILTERS | _OTHER_FILTERS:
            self.filters[name] = self._charging(name, builtin[name])
        self.filters |= {
            "format": self._formatted,
            "indent": self._indented,
            "join": self._joined,
            "replace": self._replaced,
            "string": lambda value: str(self._checked(value)),
            "tojson": self._as_json,
        }
        # lipsum makes as much text as it is told to.
        del self.globals["lipsum"]
        self.globals["dict"] = self._dictionary

    @contextmanager
    def limits(self) -> Iterator[None]:
        """Within, everything counts; begins with a full budget.

        Raises:
            LimitExceeded: more than MAX_BYTES were made, or more than MAX_STEPS lines executed.
        """
        self._left = MAX_BYTES
        with _limited_steps(MAX_STEPS):
            yield

    def charge(self, amount: int) -> None:
        """Take `amount` bytes off the budget.

        Raises:
            LimitExceeded: so much is not left.
        """
        self._left -= amount
        if self._left < 0:
            raise LimitExceeded(f"it makes more than {MAX_BYTES} bytes of text and lists")

    def charge_whole(self, value: object) -> None:
        """Charge the value with all that is in it, as often as it is in it.

        A list that holds another one twice, which holds another one twice, is small in memory and endless
        as text.
        """
        left = self._left
        waiting: list[Any] = [value]
        # Steps are not counted here, and to look whether they are takes most of the time.
        with _limited_steps(None):
            while waiting and left >= 0:
                item = waiting.pop()
                left -= _ELEMENT_BYTES
                if isinstance(item, str):
                    left -= len(item)
                elif isinstance(item, dict):
                    waiting += item.keys()
                    waiting += item.values()
                elif isinstance(item, (list, tuple, *_VIEWS)):
                    waiting.extend(item)
                elif isinstance(item, Namespace):
                    raise LimitExceeded("a namespace cannot be written or put into a list")
        self.charge(self._left - left)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Any arithmetic; see jinja2."""
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            # What most templates consist of; the long way finds what is wrong.
            self._left -= _OBJECT_BYTES + len(left) + len(right)
            if self._left >= 0:
                return left + right
        numbers = [value for value in (left, right) if isinstance(value, int)]
        sized = [value for value in (left, right) if hasattr(value, "__len__")]
        if any(value.bit_length() > _MAX_INTEGER_BITS for value in numbers) or operator == "**":
            raise LimitExceeded("numbers of this size are not available in chat templates")
        if operator == "%" and isinstance(left, str):
            return self._formatted(left, *(right if isinstance(right, tuple) else (right,)))
        if sized:
            factor = abs(numbers[0]) if operator == "*" and numbers else 1
            self.charge(_OBJECT_BYTES + factor * sum(map(_shallow_bytes, sized)))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may have the attribute; see jinja2."""
        for kind, allowed in _METHODS:
            if isinstance(obj, kind):
                return attr in allowed
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """What stands for `str.format`; see jinja2."""
        text = getattr(value, "__self__", None)
        if not isinstance(value, BuiltinMethodType) or not isinstance(text, str):
            return None
        if value.__name__ == "format":
            return functools.partial(self._filled, text)
        return None

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Any call in a template; see jinja2."""
        text = getattr(function, "__self__", None)
        if isinstance(function, BuiltinMethodType) and isinstance(text, str):
            # Inside of loops and blocks jinja2 passes its own variables along.
            kwargs = {name: value for name, value in kwargs.items() if not name.startswith("_")}
            match function.__name__:
                case "join":
                    return self._joined(args[0], text)
                case "replace":
                    return self._replaced(text, *args, **kwargs)
                case "split" | "rsplit" | "splitlines":
                    self.charge(len(text) + _OBJECT_BYTES * (1 + _separators(text, *args, **kwargs)))
                case _:
                    self.charge(_OBJECT_BYTES + _shallow_bytes(text))
        return super().call(context, function, *args, **kwargs)

    def joined(self, values: tuple[object, ...]) -> str:
        """The operator `~`."""
        return self._concatenated(str(self._checked(value)) for value in values)

    def sliced(self, value: Any, start: Any, stop: Any, step: Any) -> Any:
        """`value[start:stop:step]`."""
        part = slice(start, stop, step)
        if hasattr(value, "__len__"):
            self.charge(_OBJECT_BYTES + _shallow_bytes(value))
        return value[part]

    def literal(self, value: object) -> object:
        """A list, tuple or dictionary that stands in the template."""
        self.charge_whole(value)
        return value

    def _checked(self, value: object) -> object:
        """`value`, of which the text can be made."""
        if not isinstance(value, str):
            self.charge_whole(value)
        return value

    def _concatenated(self, parts: Iterable[str]) -> str:
        texts = list(parts)
        self.charge(_OBJECT_BYTES + sum(map(_shallow_bytes, texts)))
        return "".join(texts)

    def _charging(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter `name`, which charges for its result first."""
        passes_context = hasattr(function, "jinja_pass_arg")

        @functools.wraps(function)  # keeps jinja2's mark on filters that take the context first
        def charging(*args: Any, **kwargs: Any) -> Any:
            value = args[1] if passes_context else args[0]
            for argument in (*args, *kwargs.values()):
                if isinstance(argument, int) and argument is not value and abs(argument) > _MAX_ARGUMENT:
                    raise LimitExceeded(f"filter {name} with the number {argument}")
            if name in _TEXT_FILTERS:
                self._checked(value)
                self.charge(_OBJECT_BYTES + _ESCAPED * _shallow_bytes(value))
            elif name in _COPYING_FILTERS and hasattr(value, "__len__"):
                self.charge(_OBJECT_BYTES * (1 + len(value)))
            return function(*args, **kwargs)

        return charging

    def _as_json(
        self,
        value: object,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        # As transformers has it: jinja2's own makes HTML.
        self.charge_whole(value)
        text = json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=None if indent is None else min(int(indent), 8),
            separators=separators,
            sort_keys=sort_keys,
        )
        self.charge(len(text))
        return text

    def _dictionary(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        made = dict(*args, **kwargs)
        self.charge_whole(made)
        return made

    def _filled(self, text: str, *values: object) -> str:
        """`text.format(*values)` for plain `{}`."""
        pieces = text.split("{}")
        if len(pieces) - 1 > len(values) or any("{" in piece or "}" in piece for piece in pieces):
            raise LimitExceeded("format is available with plain {} and as many values only")
        mixed = [pieces[0]]
        for value, piece in zip(values, pieces[1:], strict=False):
            mixed += (str(self._checked(value)), piece)
        return self._concatenated(mixed)

    def _formatted(self, text: object, *values: object) -> str:
        """`text % values` for plain `%s` and `%d`."""
        pattern = str(self._checked(text))
        if "%" in pattern.replace("%s", "").replace("%d", ""):
            raise LimitExceeded("% is available with plain %s and %d only")
        self.charge(len(pattern) + sum(len(str(self._checked(value))) for value in values))
        return pattern % values

    def _indented(self, text: object, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        whole = str(self._checked(text))
        margin = width if isinstance(width, str) else " " * min(width, _MAX_ARGUMENT)
        self.charge(len(whole) + (1 + _separators(whole)) * (len(margin) + _OBJECT_BYTES))
        return do_indent(whole, margin, first, blank)

    def _joined(self, values: Iterable[object], separator: object = "", attribute: str | None = None) -> str:
        texts: list[str] = []
        for number, value in enumerate(values):
            if number:
                texts.append(str(self._checked(separator)))
            item = value if attribute is None else self.getitem(value, attribute)
            texts.append(str(self._checked(item)))
            # The list itself grows by two references each time.
            self.charge(2 * _REFERENCE_BYTES)
        return self._concatenated(texts)

    def _replaced(self, text: object, old: str, new: str, count: int | None = None) -> str:
        whole = str(self._checked(text))
        found = whole.count(str(old))
        self.charge(len(whole) + found * len(str(new)))
        return whole.replace(str(old), str(new), -1 if count is None else count)


class _ChargingCode(CodeGenerator):
    """Compiles the expressions that make something into calls of LimitedEnvironment."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - named as jinja2 looks for it
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:  # noqa: N802 - named as jinja2 looks for it
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.sliced(")
        self.visit(node.node, frame)
        for bound in (node.arg.start, node.arg.stop, node.arg.step):
            self.write(", ")
            if bound is None:
                self.write("None")
            else:
                self.visit(bound, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:  # noqa: N802 - named as jinja2 looks for it
        self._literal(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:  # noqa: N802 - named as jinja2 looks for it
        self._literal(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:  # noqa: N802 - named as jinja2 looks for it
        if node.ctx == "load":
            self._literal(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _literal(self, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write("environment.literal(")
        visit(node, frame)
        self.write(")")


def _shallow_bytes(value: Any) -> int:
    return (
        len(value) * (1 if isinstance(value, str) else _REFERENCE_BYTES) if hasattr(value, "__len__") else 0
    )


def _separators(text: str, separator: str | None = None, *_args: object, **_kwargs: object) -> int:
    """At how many places `text` is split at most; white space if there is no separator."""
    return text.count(separator) if isinstance(separator, str) and separator else sum(map(str.isspace, text))


@contextmanager
def _limited_steps(steps: int | None) -> Iterator[None]:
    """Stop the Python code inside after `steps` lines, always at the same one; None lifts the limit."""
    left = steps or 0

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal left
        if frame.f_code.co_filename == __file__:
            # The budget limits what is done here.
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise LimitExceeded(f"more than {steps} steps")
        return trace

    outer = sys.gettrace()
    sys.settrace(None if steps is None else trace)
    try:
        yield
    finally:
        sys.settrace(outer)
