"""Run somebody else's Jinja template as transformers does, within bounds.

    template = compile_template("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    text, spans = template.run({"messages": [{"role": "user", "content": "Hi"}]})

A chat template is a program that came with the weights. Jinja's sandbox keeps it away from files
and from Python; this file also counts what it costs, so that a template that never ends, or that
doubles a text sixty times, is one sentence instead of a machine that hangs. Counting happens where
work is made: every iteration, call, filter and output, and every text or list that is created,
before it is where it could be huge. No threads, no signals; the clock is only read.

Jinja has hooks for calls, filters, output and the operators + * ** %: Environment charges there.
Loops, literals, slices, ~ and {% set %} blocks become plain Python instead: Metered rewrites them
as filters of our own while the template is compiled. What is charged is steps (time) and weight
(memory: characters and entries, each printed or copied time anew), by one Meter a rendering.

The environment is that of transformers 5.24 (utils/chat_template_utils.py): trim_blocks,
lstrip_blocks, break and continue, {% generation %}, tojson that escapes nothing, raise_exception,
strftime_now. Left out are filters that no chat template needs and that are slow or random.
"""
from __future__ import annotations

import json
import re
import time
import types
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any, Callable, Iterable, Iterator

from config import UserError

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2 import nodes
from jinja2.visitor import NodeTransformer


SOURCE = 200_000        # characters of a template; the longest published ones have 20,000
STEPS = 1_000_000       # iterations, calls and filters of one rendering; more for a long input
SIZE = 1_000_000        # characters and entries of one text or list, besides what came in
TOTAL = 32              # all that is made may be this many times as large
SECONDS = 10.0
BITS = 4096             # of an integer
UNSAFE_FILTERS = ("pprint", "random", "striptags", "urlize", "wordwrap", "xmlattr")
METER: ContextVar[Meter] = ContextVar("METER")


class Exceeded(jinja2.TemplateError):
    """A template that costs more than any conversation is worth."""


class Raised(jinja2.TemplateError):
    """What the template itself says, by raise_exception()."""


class Meter:
    """What one rendering may still cost.

    spans: [start, end) of every {% generation %} block in the output. known: id -> weight of the
    lists and dicts that came in, which would otherwise be weighed at every use.
    """

    def __init__(self, variables: dict[str, Any]):
        self.known: dict[int, int] = {}
        self.known = self._weights(variables)
        given = self.known[id(variables)]
        self.steps = STEPS + 20 * given
        self.size = SIZE + 4 * given
        self.left = TOTAL * self.size
        self.until = time.monotonic() + SECONDS
        self.written = 0
        self.spans: list[tuple[int, int, str]] = []

    def step(self, count: int = 1) -> None:
        """Charge for `count` turns of a loop, calls or filters, and look at the clock."""
        self.steps -= count
        if self.steps < 0:
            raise Exceeded("it takes more than a million steps")
        if time.monotonic() > self.until:
            raise Exceeded(f"it takes more than {SECONDS:.0f} seconds")

    def room(self, size: int) -> None:
        """Refuse a text or list of `size`, before it is made or just after."""
        self.left -= size
        if size > self.size or self.left < 0:
            raise Exceeded(f"it makes a text or list of more than {self.size:,} characters")

    def _weights(self, value: Any) -> dict[int, int]:
        """Return id -> characters and entries of `value` and all containers in it.

        An object that stands in a list twice counts twice: printing it would print it twice.
        """
        weights: dict[int, int] = {}

        def weigh(v: Any) -> int:
            if isinstance(v, (str, bytes)):
                return len(v) + 1
            if not isinstance(v, (list, tuple, dict)):
                return 1
            if (w := self.known.get(id(v)) or weights.get(id(v))) is None:
                parts = (*v.keys(), *v.values()) if isinstance(v, dict) else v
                w = weights[id(v)] = 1 + sum(map(weigh, parts))
            return w

        weigh(value)
        return weights

    def weight(self, value: Any) -> int:
        """Return the characters and entries of a value, as printing it would write them."""
        if isinstance(value, (str, bytes)):
            return len(value)
        if isinstance(value, (list, tuple, dict)):
            return self.known.get(id(value)) or self._weights(value)[id(value)]
        return 1

    # every value that an expression makes passes here once, and those that came in are free
    def take(self, value: Any) -> Any:
        """Charge for a value and return it; a generator is charged while it is read."""
        if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > BITS:
            raise Exceeded(f"it makes a number of more than {BITS} bits")
        if isinstance(value, types.GeneratorType):
            return self.each(value)
        if id(value) not in self.known:
            self.room(self.weight(value))
        return value

    def each(self, values: Iterable, size: int = 0) -> Iterator:
        """Iterate, a step an item; size: characters that the body of the loop writes each time."""
        for value in values:
            self.step()
            if size:
                self.room(size)
            yield value

# ---------------------------------------------------------------- operations that can make much


def add(left: Any, right: Any) -> Any:
    """Return left + right: texts, lists or numbers."""
    if isinstance(left, (str, bytes, list, tuple)):
        METER.get().room(len(left))
    return METER.get().take(left + right)


def multiply(left: Any, right: Any) -> Any:
    """Return left * right; 'ab' * 10 ** 9 is refused before it is made."""
    meter = METER.get()
    # either side may be the number
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, (str, bytes, list, tuple)) and isinstance(times, int):
            meter.room(meter.weight(sequence) * max(0, times))
    if isinstance(left, int) and isinstance(right, int) and (
            left.bit_length() + right.bit_length() > BITS):
        raise Exceeded(f"it makes a number of more than {BITS} bits")
    return left * right


def power(left: Any, right: Any) -> Any:
    """Return left ** right; 9 ** 9 ** 9 is refused before it is computed."""
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > BITS:
        raise Exceeded(f"it makes a number of more than {BITS} bits")
    return left ** right


def format_percent(left: Any, right: Any) -> Any:
    """Return left % right, the remainder of numbers or the formatting of a text."""
    if isinstance(left, (str, bytes)):
        form = left if isinstance(left, str) else left.decode("latin-1")
        check_format(form, "%", right)
    return left % right


def check_format(form: str, sign: str, *args: Any) -> None:
    """Make room for a text that `args` are formatted into, each of them at every sign.

    Refused are widths of thousands, and those that are arguments themselves.
    """
    bare = form.replace("%%", "").replace("{{", "").replace("}}", "")
    wide = r"%[^a-zA-Z%]*?(?:\d{4}|\*)" if sign == "%" else r"\{[^{}]*(?:\d{4}|\{)"
    if re.search(wide, bare):
        raise Exceeded(f"it formats with {form[:40]!r}")
    # each argument may be printed at every sign, as {0}{0}{0} does
    METER.get().room(len(form) + bare.count(sign) * sum(map(METER.get().weight, args)))


def check_widths(args: Iterable[Any], most: int) -> None:
    """Refuse an argument that asks for more than `most` of something."""
    for value in args:
        if isinstance(value, int) and abs(value) > most:
            raise Exceeded(f"it asks for {value:,} at once")


def check_replace(text: str, old: str, new: str, *_: Any) -> None:
    """Make room for text.replace(old, new)."""
    METER.get().room(len(text) + text.count(old) * max(0, len(new) - len(old)))


def guard_method(owner: Any, name: str, args: tuple) -> None:
    """Refuse the call of a method of str, bytes or int whose result could be huge."""
    meter = METER.get()
    if name in ("center", "ljust", "rjust", "zfill", "expandtabs", "to_bytes"):
        check_widths(args, 1000)
    elif name == "replace" and len(args) > 1 and all(isinstance(a, str) for a in args[:2]):
        check_replace(owner, *args)
    elif name == "join" and len(args) == 1:
        # the separator once an item, however short the items are
        meter.room(meter.weight(args[0]) + len(owner) * len(args[0]))
    elif name == "translate":
        raise Exceeded("it translates characters")
    # all others give at most what they were called on
    meter.room(len(owner) if isinstance(owner, (str, bytes)) else 0)


def guard_filter(name: str, args: list, kwargs: dict) -> None:
    """Refuse or bound a filter whose result could be much larger than what it is given."""
    meter = METER.get()
    rest = [*args[1:], *kwargs.values()]
    if name in ("batch", "slice", "center", "indent", "truncate"):
        check_widths(rest, 1000)
    if name in ("round", "tojson"):
        check_widths([*rest, *map(meter.weight, rest)], 100)      # indent and separators, too
    if name == "indent":
        wide = max([4, *(len(a) if isinstance(a, str) else int(a) for a in rest)])
        meter.room(len(str(args[0])) + wide * (1 + str(args[0]).count("\n")))
    elif name == "replace" and len(args) > 2:
        check_replace(*map(str, args[:3]))
    elif name == "format":
        check_format(str(args[0]), "%", *rest)
    elif name == "int" and isinstance(args[0], str):
        check_widths([len(args[0])], 4000)
    elif name in ("join", "sum", "list", "sort", "unique", "groupby", "dictsort", "batch", "slice"):
        if not isinstance(args[0], (str, dict, jinja2.Undefined)):
            args[0] = list(meter.each(args[0]))
        separator = str(rest[0]) if name == "join" and rest else ""
        if not isinstance(args[0], jinja2.Undefined):
            meter.room(meter.weight(args[0]) + len(separator) * len(args[0]))
    if name == "sum" and not all(isinstance(a, (int, float, str)) for a in rest):
        raise Exceeded("it sums lists")


class Metered(NodeTransformer):
    """Put the meter around what Jinja compiles to plain Python: loops, literals, slices, ~."""

    @staticmethod
    def through(name: str, node: nodes.Node | None, *args: nodes.Expr) -> nodes.Filter:
        """Return the node as the input of one of our own filters: ~each, ~take, ~concat."""
        line = getattr(node, "lineno", 1)
        return nodes.Filter(node, name, list(args), [], None, None, lineno=line)

    def visit_For(self, node: nodes.For) -> nodes.For:
        """Count the turns of a loop, and the constant text that each of them writes."""
        size = sum(len(data.data) for part in node.body
                   for data in part.find_all(nodes.TemplateData))
        self.generic_visit(node)
        node.iter = self.through("~each", node.iter, nodes.Const(size))
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.AssignBlock:
        """Charge for {% set x %}…{% endset %}: a text that is not printed yet."""
        self.generic_visit(node)
        node.filter = self.through("~take", node.filter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        """Charge for a ~ b, which Jinja compiles to a join that no hook sees."""
        self.generic_visit(node)
        return self.through("~concat", nodes.List(node.nodes, lineno=node.lineno))

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        """Charge for a slice, which is a copy."""
        self.generic_visit(node)
        return self.through("~take", node) if isinstance(node.arg, nodes.Slice) else node

    def literal(self, node: Any) -> nodes.Expr:
        """Charge for [x, x] and its kin, by which a value doubles; constants are free."""
        self.generic_visit(node)
        items = node.items
        if getattr(node, "ctx", "load") != "load" or all(
                isinstance(item, nodes.Const) for item in items):
            return node
        return self.through("~take", node)

    visit_List = visit_Tuple = visit_Dict = literal


class Generation(jinja2.ext.Extension):
    """{% generation %}…{% endgeneration %}: what is in it is what the assistant says."""
    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        """Parse the block into a call of mark() with its body."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Callable) -> str:
        """Note where the block stands in what is written so far, and return its text."""
        text = caller()
        meter = METER.get()
        meter.spans.append((meter.written, meter.written + len(text), text))
        return text


class Namespace(jinja2.utils.Namespace):
    """namespace() of a template: no names with an underscore first, and nothing to print."""

    def __init__(*args: Any, **kwargs: Any):    # namespace(self=…) is allowed, as in Jinja
        self = args[0]
        args = args[1:]
        attrs = dict(*args, **kwargs)
        for name in attrs:
            check_name(name)
        jinja2.utils.Namespace.__init__(self, attrs)

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


def check_name(name: Any) -> None:
    """Refuse names of Python's own attributes."""
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name[:40]!r}")


class TemplateDict:
    """dict() of a template, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict:
        """Return dict.fromkeys(), which removes duplicates from a list."""
        return dict.fromkeys(*args)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """transformers' environment, with a meter on every operation."""
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, finalize=charge_output,
                         extensions=[Generation, jinja2.ext.loopcontrols])
        self.binop_table.update({"+": add, "*": multiply, "**": power, "%": format_percent})
        self.globals.update(raise_exception=raise_exception, strftime_now=strftime_now,
                            dict=TemplateDict(), namespace=Namespace)
        del self.globals["lipsum"]
        for name in UNSAFE_FILTERS:
            del self.filters[name]
        self.filters["tojson"] = tojson
        self.filters = {name: meter_filter(name, f) for name, f in self.filters.items()}
        # names that no template can spell
        self.filters.update({"~each": each, "~take": take, "~concat": concat})

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        """Compile a template to Python, with the meter put in."""
        # the visitor's new nodes know no environment, which the compiler asks them for
        tree = Metered().visit(source)
        tree.set_environment(self)
        return super()._generate(tree, *args, **kwargs)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a macro, a method or a global: Jinja's hook for every call of a template."""
        meter = METER.get()
        meter.step(20)          # a macro takes as long as some turns of a loop
        if isinstance(__obj, types.BuiltinMethodType):
            owner = __obj.__self__
            if isinstance(owner, (str, bytes, int)):
                # a generator is read once: it is weighed as the list that it gives
                if __obj.__name__ == "join" and args and not isinstance(args[0], (list, tuple)):
                    args = (list(meter.each(args[0])), *args[1:])
                guard_method(owner, __obj.__name__, (*args, *kwargs.values()))
        return meter.take(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable | None:
        """Return Jinja's guarded str.format() with a check of its width, None for others."""
        wrapper = super().wrap_str_format(value)
        if wrapper is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            check_format(value.__self__, "{", *args, *kwargs.values())
            return wrapper(*args, **kwargs)
        return checked


@jinja2.pass_context
def each(context: Any, value: Any, size: int) -> Iterator:
    """Iterate over the value of a {% for %}, counted."""
    return METER.get().each(value, size)


@jinja2.pass_context
def take(context: Any, value: Any) -> Any:
    """Charge for a value that an expression has made."""
    return METER.get().take(value)


@jinja2.pass_context
def concat(context: Any, parts: list) -> str:
    """Join what stands between the ~ of an expression, after room was made for it."""
    METER.get().room(METER.get().weight(parts))
    return "".join(map(str, parts))


@jinja2.pass_context
def charge_output(context: Any, value: Any) -> Any:
    """Charge for what {{ … }} prints."""
    meter = METER.get()
    meter.room(meter.weight(value))
    return value


def meter_filter(name: str, function: Callable) -> Callable:
    """Return the filter, counted. It asks for the context, so nothing is folded at compile time."""
    wants = getattr(getattr(function, "jinja_pass_arg", None), "name", "")

    @jinja2.pass_context
    def call(context: Any, *args: Any, **kwargs: Any) -> Any:
        meter = METER.get()
        given = list(args)
        meter.step()
        guard_filter(name, given, kwargs)
        first = {"context": [context], "eval_context": [context.eval_ctx],
                 "environment": [context.environment]}.get(wants, [])
        return meter.take(function(*first, *given, **kwargs))
    return call


def tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None,
           separators: Any = None, sort_keys: bool = False) -> str:
    """Return JSON without Jinja's HTML escapes."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def raise_exception(message: Any) -> None:
    """Refuse a conversation in the template's own words."""
    raise Raised(str(message))


def strftime_now(form: str) -> str:
    """Return the date: transformers' global, which Llama 3.1 asks for today's."""
    if len(form) > 200 or re.search(r"%[^a-zA-Z%]*\d{2}", form):
        raise Exceeded(f"it formats a date with {form[:40]!r}")
    return datetime.now().strftime(form)

# -------------------------------------------------------------------------- templates, compiled


class Template:
    """A compiled chat template.

    names: the variables that it reads (messages, tools, enable_thinking, …). marked: whether it
    says by {% generation %} what is trained on.
    """

    def __init__(self, source: str):
        if len(source) > SOURCE:
            raise UserError(f"expected a chat template of at most {SOURCE:,} characters, got "
                            f"{len(source):,}: give another with --template=")
        # CVE-2025-27516: before it, |attr reached str.format()
        if tuple(map(int, re.findall(r"\d+", jinja2.__version__)[:3])) < (3, 1, 6):
            raise UserError(f"the model's chat template needs jinja2 3.1.6 or newer, whose sandbox "
                            f"holds; this is {jinja2.__version__}: pip install -U jinja2")
        environment = Environment()
        try:
            tree = environment.parse(source)
            self.names = frozenset(jinja2.meta.find_undeclared_variables(tree))
            # a call to the extension is what the tag becomes
            self.marked = any(node.identifier.endswith("Generation") for node in
                              tree.find_all(nodes.ExtensionAttribute))
            self.compiled = environment.from_string(source)
        except jinja2.TemplateError as e:
            raise UserError(f"the model's chat template is not valid Jinja (line "
                            f"{getattr(e, 'lineno', '?')}: {shorten(e)}); give another with "
                            "--template=") from None
        except (RecursionError, MemoryError, SyntaxError, OverflowError, ValueError) as e:
            raise UserError(f"the model's chat template does not compile ({shorten(e)}); give "
                            "another with --template=") from None

    def run(self, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """Return (text, [start, end) of each generation block in it)."""
        try:
            meter = Meter(variables)
            token = METER.set(meter)
            try:
                pieces = []
                for piece in self.compiled.generate(variables):
                    pieces.append(piece)
                    meter.written += len(piece)
                    if meter.written > meter.size:
                        raise Exceeded(f"it writes more than {meter.size:,} characters")
            finally:
                METER.reset(token)
        except Raised as e:
            raise UserError(f"the model's chat template refuses the conversation: {shorten(e)}"
                            ) from None
        except Exceeded as e:
            raise UserError(f"the model's chat template is refused, {shorten(e)}: give another "
                            "with --template=") from None
        except RecursionError:
            raise UserError("the model's chat template is refused, it calls itself without end: "
                            "give another with --template=") from None
        except Exception as e:      # a foreign program: any error of Python can come out of it
            raise UserError(f"the model's chat template fails on this conversation "
                            f"({type(e).__name__}: {shorten(e)})") from None
        text = "".join(pieces)
        # a block within {% set %}, a filter or a macro is not where it was noted
        if any(text[start:end] != said for start, end, said in meter.spans):
            raise UserError("the model's chat template has a generation block whose output it "
                            "changes afterwards: what is trained on cannot be told")
        return text, [(start, end) for start, end, _ in meter.spans]


def shorten(error: BaseException, length: int = 300) -> str:
    """Return an error's words on one line, and not too many of them."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[:length] + "…"


@lru_cache(maxsize=64)
def compile_template(source: str) -> Template:
    """Return the compiled template; compiling takes some milliseconds, so it is kept."""
    return Template(source)
