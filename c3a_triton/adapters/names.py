"""Which adapters a call computes with: a value of the call's own, in a context variable, that layers read.

Nothing of it is written into layers, so that threads and asyncio tasks that share a model do not meet. A thread that
was started within `using` has a context of its own, an empty one: a layer that is called there while `using` is open
elsewhere refuses, because nobody can tell which adapters were meant. A layer that is computed a second time in a
backward pass (gradient checkpointing) gets what held in its first, whatever holds by then and in whichever thread.
"""

import itertools
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from c3a_triton._ops import add_op_namespace_prefix
from c3a_triton._ops import ops as registered_ops
from c3a_triton.errors import AdapterStateError, ShapeError

__all__ = ["BASE_ROW", "Call", "Layout", "Scope", "expand_rows", "rows_of_call", "uncompiled"]

BASE_ROW = "__base__"
"""The name, among the adapter names of a batch's rows, of a row that gets the base model alone."""

# What rounding changes of a layer's input when its row is computed beside another one, over the sum of absolute values.
_SUMS_AGREE = 1e-3
# Calls whose backward pass may still come are remembered; of older ones a recomputation is refused.
_MOST_PAST_CALLS = 1024


def expand_rows(names: Sequence[str], n_rows: int, *, exact: bool = False) -> list[str]:
    """One adapter name per row of a tensor, from one per row of the batch, which makes several consecutive ones.

    Raises:
        ShapeError: the numbers do not fit, or with `exact` are not equal.
    """
    if not names or n_rows % len(names) or (exact and n_rows != len(names)):
        raise ShapeError(f"{len(names)} adapter names for a batch of {n_rows} rows: give one name per row")
    return [name for name in names for _ in range(n_rows // len(names))]


class Layout(NamedTuple):
    """What a probe saw of a layer's input: its dimensions, the first one, and sums over all and over its first half."""

    n_dims: int
    n_rows: int
    whole: tuple[float, float]
    first_half: tuple[float, float]


@dataclass(eq=False)
class Call:
    """What holds in one context.

    Attributes:
        names: an adapter's name for each row of the batch; None for the active adapters.
        tokens: a packed row whose tokens have adapters of their own (`token_slots`), or None.
        disabled: whether the base model computes alone.
        n_rows: the batch of the call of the model that is under way, or None outside of any.
        tried: whether trials with fewer rows have shown what layers see in calls of this form.
        probe: where layers note the layout of what they see, while a probe runs; the base model computes then.
        graphs: whether it began where operations are recorded for a backward pass.
        repeats: whether layers were called in such a way that a backward pass may call them again.
    """

    names: tuple[str, ...] | None = None
    tokens: Any = None
    disabled: bool = False
    n_rows: int | None = None
    tried: bool = False
    probe: dict[str, list[Layout]] | None = None
    graphs: bool = False
    repeats: bool = False
    _rows: dict[tuple[tuple[str, ...], int], Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """How layers compute: `"probe"`, `"base"`, `"tokens"`, `"rows"` or `"active"`."""
        if self.probe is not None:
            return "probe"
        if self.disabled:
            return "base"
        if self.tokens is not None:
            return "tokens"
        return "active" if self.names is None else "rows"

    def rows(self, adapters: tuple[str, ...], n_rows: int) -> Tensor:
        """For each of a tensor's rows the index of its adapter among these, or −1: int64 on the CPU."""
        assert self.names is not None
        found = self._rows.get((adapters, n_rows))
        if found is None:
            index = {name: i for i, name in enumerate(adapters)}
            one_name = len(set(self.names)) == 1
            names = self.names[:1] * n_rows if one_name else expand_rows(self.names, n_rows)
            found = torch.tensor([index.get(name, -1) for name in names], dtype=torch.int64, device="cpu")
            self._rows[adapters, n_rows] = found
        return found


def _nothing() -> None:
    return None


class _Local(threading.local):
    """What compiled code sees of a thread's context: it can read a thread's attributes, but no context variables."""

    def __init__(self) -> None:  # once in each thread: a class's default value would be one for compiled code
        self.kind = "unset"
        self.tokens: Any = None  # `Call.tokens`
        self.n_calls = 0  # of the model, that began with names of their own
        self.again: Callable[[], Call | None] = _nothing  # what a backward pass computes layers again with


@dataclass(eq=False)
class _Entry:
    """A `Call` that has begun, and where."""

    call: Call | None  # None when it has ended and no backward pass may ask for it
    is_open: bool
    thread: int
    started: int  # torch's number for the next node of this thread's autograd graph
    order: int


# Innermost last. What has ended is taken out wherever it is: generators that take turns end in any order.
_CALLS: ContextVar[Mapping["Scope", tuple[Call, ...]]] = ContextVar("c3a_triton_calls", default={})  # noqa: B039 (never changed)
_LOCK = threading.RLock()  # memory is collected, and calls with it, at any moment
_ORDER = itertools.count()
_SCOPES: weakref.WeakValueDictionary[int, "Scope"] = weakref.WeakValueDictionary()
_KEYS = itertools.count()


class Scope:
    """The layers of one model, for which a call's adapters hold; a copy of the model has a scope of its own.

    Args:
        managed: whether a manager has made it, whose layers those are that have it.

    Attributes:
        managed: as given.
        lock: held while adapters are changed, and while their values are copied for requests.
        steps: held while requests are computed: transformers notes in the model's config what one call of it is to do.
        servers: what knows which adapters requests are computed with, by `names_in_use()`.
        watched: whether a layer has to ask for the present call at all.
        is_open: whether a context (`using`, `disable_adapter`) is open in any thread or task.
        is_hidden: whether one is, or has ended but holds in a copy that a thread or task has made of it.
        layouts: layer name → what is wrong with dividing its input among the rows of the batch; None if nothing is.
        trials: form of a call → what trials with fewer rows have told (`row_names`).
        token_layouts: what a trial with few tokens has told (`token_layouts`); None before it.
        why_unknown: why a probe has told nothing, as a part of a message.
    """

    def __init__(self, managed: bool = False) -> None:
        self.managed = managed
        self.lock = threading.RLock()
        self.steps = threading.Lock()
        self.servers: weakref.WeakSet[Any] = weakref.WeakSet()
        self.watched = False
        self.is_open = self.is_hidden = False
        self.layouts: dict[str, str | None] = {}
        self.trials: dict[Any, Any] = {}
        self.token_layouts: Mapping[str, str] | None = None
        self.why_unknown = ""
        self.local = _Local()
        self.key = next(_KEYS)
        self._calls: set[weakref.ref[Call]] = set()  # all that some context, or a backward pass to come, still has
        self._open: list[_Entry] = []
        self._past: deque[tuple[_Entry, int]] = deque()
        self._forgotten: dict[int, int] = {}  # thread → where the last call ended that is remembered no longer
        self._silent: dict[int, tuple[int, int]] = {}  # thread → from where to where it may have made nodes without one
        _SCOPES[self.key] = self

    def __reduce__(self) -> Any:
        return Scope, (self.managed,)

    # Entering and leaving

    def enter(self, *, is_open: bool = False, **changes: Any) -> _Entry:
        """Let these fields of `Call` hold in the present context, until `leave`.

        Args:
            is_open: whether other threads must not compute meanwhile without a context of their own.
            changes: fields of `Call`.
        """
        self.local.again = _nothing
        calls = _CALLS.get()
        before = calls.get(self, ())
        call = replace(self.said() or Call(), _rows={}, graphs=torch.is_grad_enabled(), repeats=False, **changes)
        started = torch._C._autograd._get_sequence_nr()
        entry = _Entry(call, is_open, threading.get_ident(), started, next(_ORDER))
        with _LOCK:
            self._calls.add(weakref.ref(call, self._drop))
            self._open.append(entry)
            self._watch()
        _CALLS.set({**calls, self: (*before, call)})
        # Tasks take turns in one thread: compiled code has to ask for the context there.
        self.local.kind = "ask" if _in_event_loop() else call.kind
        self.local.tokens = call.tokens
        return entry

    def leave(self, entry: _Entry) -> None:
        """End what `enter` began."""
        calls = dict(_CALLS.get())
        stack = tuple(call for call in calls.pop(self, ()) if call is not entry.call)
        if stack:
            calls[self] = stack
        _CALLS.set(calls)
        self.local.tokens = stack[-1].tokens if stack else None
        ended, thread = torch._C._autograd._get_sequence_nr(), threading.get_ident()
        with _LOCK:
            self._open = [other for other in self._open if other is not entry]
            if any(other.thread == thread for other in self._open):
                self.local.kind = "ask" if _in_event_loop() or not stack else stack[-1].kind
            else:
                self.local.kind = "unset"
            if entry.call is not None and entry.call.repeats and ended > entry.started and thread == entry.thread:
                self._past.append((entry, ended))
                if len(self._past) > _MOST_PAST_CALLS:
                    forgotten, end = self._past.popleft()
                    self._forgotten[forgotten.thread] = end
            else:
                entry.call = None
            self._watch()

    def _drop(self, call: "weakref.ref[Call]") -> None:
        with _LOCK:
            self._calls.discard(call)
            self._watch()

    def _watch(self) -> None:
        self.is_open = any(entry.is_open for entry in self._open)
        self.is_hidden = self.is_open or len(self._calls) > len(self._open) + len(self._past)
        self.watched = bool(self._calls)

    def names_in_use(self) -> set[str]:
        """The adapters that some thread or task computes with by name, and those of requests that have not ended."""
        served = self.names_served()
        with _LOCK:
            past = {id(entry.call) for entry, _ in self._past}
            calls = [call for ref in self._calls if (call := ref()) is not None and id(call) not in past]
        return served | {name for call in calls for name in call.names or ()}

    def names_served(self) -> set[str]:
        """The adapters of requests that have not ended, `BASE_ROW` among them."""
        return {name for server in list(self.servers) for name in server.names_in_use()}

    def note_silence(self) -> None:
        """Note that a call for which nothing was said begins or ends here, with a graph."""
        thread, number = threading.get_ident(), torch._C._autograd._get_sequence_nr()
        first, _ = self._silent.get(thread, (number, number))
        self._silent[thread] = first, number

    @contextmanager
    def bound(self, *, is_open: bool = True, **changes: Any) -> Iterator[None]:
        """`enter` and `leave`."""
        entry = self.enter(is_open=is_open, **changes)
        try:
            yield
        finally:
            self.leave(entry)

    # Asking

    def kind(self) -> str:
        """`Call.kind` of what holds for a layer that is called now. Compiled code may have to be told to `"ask"`.

        Raises:
            AdapterStateError: as `present`.
        """
        if not torch.compiler.is_compiling():
            call = self.present()
            return "active" if call is None else call.kind
        kind: str = self.local.kind
        if kind == "unset":
            return "ask" if self.is_hidden else "active"
        return kind

    def said(self) -> Call | None:
        """What was said in this context, or None."""
        stack = _CALLS.get().get(self)
        return stack[-1] if stack else None

    def present(self) -> Call | None:
        """What holds for a layer that is called now, or None where nothing was said.

        Raises:
            AdapterStateError: `using` or `disable_adapter` is open, but not in this context; or a backward pass
                computes a layer again whose forward pass is too long ago.
        """
        if torch._C._current_graph_task_id() != -1:
            node = torch._C._current_autograd_node()
            if node is not None:
                return self._of_node(node._sequence_nr())
        call = self.said()
        if call is not None:
            # Checkpoints call layers without a graph, or hook into what a graph saves.
            call.repeats = call.repeats or _may_repeat(call)
        elif self.is_open:
            raise AdapterStateError(
                "using() or disable_adapter() is open in another thread or task of this process, and nothing was said "
                "in this one, which would compute with the active adapters. Enter using(names) here too (using(None) "
                "for the active adapters), or start the thread's work with contextvars.copy_context().run(...)"
            )
        return call

    def _of_node(self, number: int) -> Call | None:
        """What held when the node of the autograd graph that is run backward was made: each thread counts its own."""
        with _LOCK:
            spans = [entry for entry, ended in self._past if entry.started <= number < ended]
            spans += [entry for entry in self._open if entry.started <= number]
            innermost = {entry.thread: entry.call for entry in sorted(spans, key=lambda entry: entry.order)}
            silent = any(
                first <= number < last and thread not in innermost for thread, (first, last) in self._silent.items()
            )
            forgotten = any(number < end for end in self._forgotten.values())
        calls = {(call.kind, call.names): call for call in innermost.values() if call is not None}
        if len(calls) > 1 or (calls and silent) or (not calls and forgotten):
            raise AdapterStateError(
                "a backward pass computes layers again (gradient checkpointing), and it cannot be told with which "
                "adapters its forward pass was made: "
                + ("several threads call the model for training" if calls else "too many calls ago")
            )
        if calls:
            self.local.again = weakref.ref(next(iter(calls.values())))
        elif number < self._silent.get(threading.get_ident(), (0, 0))[1]:
            return None
        # A later node was made by a backward pass that computes layers again: checkpoints within checkpoints.
        return self.local.again()

    # Rows

    def note(self, layer_name: str, x: Tensor) -> None:
        """Note the layout of a layer's input in the probe that is under way."""
        call = self.present()
        assert call is not None
        assert call.probe is not None
        half = x[: x.shape[0] // 2] if x.dim() else x
        call.probe.setdefault(layer_name, []).append(
            Layout(x.dim(), x.shape[0] if x.dim() else 0, _sums(x), _sums(half))
        )

    def learn(self, of_one_row: Mapping[str, list[Layout]], of_two_rows: Mapping[str, list[Layout]]) -> None:
        """Take from trials with one row and with two what is wrong with the layout of each layer's input."""
        for layer_name, layouts in of_two_rows.items():
            problem = self.layouts.get(layer_name) or _problem(of_one_row.get(layer_name, []), layouts)
            self.layouts[layer_name] = problem

    def check_layout(self, layer_name: str, x: Tensor, call: Call) -> None:
        """Refuse to divide a tensor among the rows of the batch where its first dimension does not follow from it.

        Args:
            layer_name: the layer's name.
            x: its input.
            call: what holds.

        Raises:
            ShapeError: it does not, or that cannot be told.
        """
        names = call.names or ()
        if len(set(names)) < 2:
            return
        n_rows = x.shape[0] if x.dim() else 0
        batch = len(names) if call.n_rows is None else call.n_rows
        if layer_name in self.layouts:
            problem = self.layouts[layer_name] or ("is no multiple of it" if not n_rows or n_rows % batch else None)
        else:
            # [T, batch, ...] with as many tokens as rows looks like [batch, T, ...].
            square = x.dim() > 2 and x.shape[1] == batch
            problem = None if n_rows == batch and not square else "cannot be told to follow from it" + self.why_unknown
        if problem is None and call.tried and layer_name not in self.layouts and x.dim() == 2:
            problem = "depends on what the rows hold"
        if problem is not None:
            if call.tried:  # from the next call on, each adapter has a call of its own
                self.layouts[layer_name] = problem
            raise ShapeError(
                f"{layer_name}: {len(names)} adapter names for a batch of {batch} rows, and this layer's input has the "
                f"shape {tuple(x.shape)}, whose first dimension {problem}: its rows have no adapters of their own. "
                "Give all rows one adapter, or adapt the model without this layer (exclude_modules)"
            )


def _sums(x: Tensor) -> tuple[float, float]:
    values = x.detach().double()
    return values.sum().item(), values.abs().sum().item()


def _problem(of_one_row: list[Layout], of_two_rows: list[Layout]) -> str | None:
    """What is wrong with dividing a layer's input among the rows of the batch, or None."""
    if [2 * layout.n_rows for layout in of_one_row] != [layout.n_rows for layout in of_two_rows]:
        return "does not follow from it"
    for one, two in zip(of_one_row, of_two_rows, strict=True):
        tolerance = _SUMS_AGREE * max(one.whole[1], two.first_half[1])
        if not all(abs(a - b) <= tolerance for a, b in zip(one.whole, two.first_half, strict=True)):
            return "is not in its order"
    return None


def _may_repeat(call: Call) -> bool:
    return (call.graphs and not torch.is_grad_enabled()) or (
        torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    )


def _in_event_loop() -> bool:
    asyncio = sys.modules.get("asyncio")
    return asyncio is not None and asyncio._get_running_loop() is not None


# What compiled code asks

# As torch.compiler.disable, which would import the compiler (and Triton) now.
uncompiled = _disable_dynamo


def rows_of_call(scope: Scope, layer_name: str, x: Tensor, held: Iterable[str]) -> tuple[tuple[str, ...], Tensor]:
    """Adapters among those that a layer has, and for each of x's rows the index of its own among them (−1 for none).

    In compiled code these are all of the layer's, and the rows those of the call that is under way when the graph runs.

    Raises:
        ShapeError: the rows do not follow from the batch, or that cannot be told.
    """
    if torch.compiler.is_compiling():
        present = tuple(held)
        return present, registered_ops.row_indices(x, scope.key, layer_name, list(present))
    call = scope.present()
    assert call is not None
    assert call.names is not None
    scope.check_layout(layer_name, x, call)
    present = tuple(name for name in dict.fromkeys(call.names) if name in held)
    return present, call.rows(present, x.shape[0])


def _row_indices(x: Tensor, scope: int, layer_name: str, adapters: list[str]) -> Tensor:
    call = _SCOPES[scope].present()
    if call is None or call.kind != "rows":
        raise AdapterStateError(f"{layer_name}: a graph for rows with adapters of their own runs without their names")
    _SCOPES[scope].check_layout(layer_name, x, call)
    return call.rows(tuple(adapters), x.shape[0]).clone()


def _row_indices_fake(x: Tensor, scope: int, layer_name: str, adapters: list[str]) -> Tensor:
    return torch.empty(x.shape[0], dtype=torch.int64, device="cpu")


_QUALIFIED = add_op_namespace_prefix("row_indices")
torch.library.define(
    _QUALIFIED,
    "(Tensor x, int scope, str layer_name, str[] adapters) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
torch.library.impl(_QUALIFIED, "CompositeExplicitAutograd", _row_indices)
torch.library.register_fake(_QUALIFIED, _row_indices_fake)
