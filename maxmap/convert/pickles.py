"""A reader of the pickles that `torch.save` writes. It runs nothing and imports nothing that a file names.

`pickletools` decodes the opcodes. This module interprets those that torch.save uses (pickle protocol 2) and refuses all
others. A global of the file is only a name here. The few names that may be called have functions in this module, which
check their arguments and return plain data: dicts, lists, tuples, text, numbers and NumPy arrays.

A file cannot make the reader work without bound: each opcode, each copied item and each few copied bytes cost a part of
a fixed budget, no function here recurses over the content, and deep nesting is refused.
"""

import argparse
import pickletools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_BUDGET = 4_000_000  # opcodes; the checkpoint of a large model with its optimizer has about one million
_DEEPEST = 100  # containers inside of each other
_LARGEST_INTEGER = 2**127  # torch.save's magic number has 77 bits
_LARGEST_KEY = 2**60  # larger integers have the hashes of smaller ones, which makes a dict slow
_SCALAR = re.compile(r"[?bBhHiIlLqQefdFD]|b1|[iu][1248]|f[248]|c8|c16")  # NumPy's codes of plain numbers
_RENAMED = {
    "__builtin__": "builtins",
    "numpy.core.multiarray": "numpy._core.multiarray",
    "torch.tensor": "torch._tensor",
}


class RefusedGlobalError(ValueError):
    """The pickle names something that is not in the list of harmless names; the message is that name."""


@dataclass(frozen=True)
class Name:
    """A global that a pickle names.

    Attributes:
      path: module and name, for example "torch.float16". Nothing is imported.
    """

    path: str


@dataclass
class ScalarType:
    """The type of a NumPy scalar, in place of a NumPy dtype.

    Attributes:
      code: NumPy's code of a plain number, for example "f8".
      order: byte order, "<" or ">", or "|" for one byte and "=" for this machine's.
    """

    code: str
    order: str = "="


Function = Callable[..., Any]


class Unpickler:
    """Interprets one pickle.

    Attributes:
      inert: matches names that the pickle may mention but not call.
      functions: by name, what the pickle may call beside the names that this class knows. They get the arguments of the
        file, unchecked, and may raise ValueError or TypeError.
      load_storage: called with each persistent id, unchecked.
    """

    def __init__(self, inert: str, functions: Mapping[str, Function], load_storage: Function) -> None:
        self.inert = re.compile(inert)
        self.load_storage = load_storage
        self.functions: dict[str, Function] = {
            "argparse.Namespace": argparse.Namespace,
            "builtins.bytearray": _same_bytes,
            "builtins.complex": _complex,
            "builtins.set": self._set,
            "collections.Counter": self._dict,
            "collections.OrderedDict": self._dict,
            "_codecs.encode": self._encode,
            "numpy.dtype": _scalar_type,
            "numpy._core.multiarray.scalar": _scalar,
            **functions,
        }
        self._budget = _BUDGET
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def load(self, file: Any) -> Any:
        """Reads the pickle at the position of a file, which is then behind it.

        Raises:
          RefusedGlobalError: the pickle names something else than `inert` and `functions` allow.
          ValueError, TypeError, IndexError, KeyError, OverflowError: the pickle is damaged or not of torch.save.
        """
        argument: Any
        for opcode, argument, _ in pickletools.genops(file):
            self._spend(1)
            name: str = opcode.name
            if name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name]())
            elif name in _LITERALS:
                if type(argument) is int and abs(argument) >= _LARGEST_INTEGER:
                    raise ValueError("it has an integer of more than 127 bits")
                self._stack.append(argument)
            elif name in ("BINGET", "LONG_BINGET"):
                self._stack.append(self._memo[argument])
            elif name in ("BINPUT", "LONG_BINPUT"):
                self._memo[argument] = self._stack[-1]
            elif name in _TUPLES:
                size = _TUPLES[name]
                self._stack[-size:] = [tuple(self._take(size))]
            elif name == "STOP":
                break
            elif name != "PROTO":
                handler = _HANDLERS.get(name)
                if handler is None:
                    raise ValueError(f"it has the pickle opcode {name}, which torch.save does not write")
                handler(self, argument)
        result = self._stack.pop()
        if self._stack or self._marks:
            raise ValueError("its pickle ends too early")
        check_depth(result)
        return result

    def _spend(self, cost: int) -> None:
        self._budget -= cost
        if self._budget < 0:
            raise ValueError(f"its pickle takes more than {_BUDGET:,} steps")

    def _take(self, count: int) -> list[Any]:
        """Returns the topmost values; the stack keeps them."""
        if len(self._stack) - (self._marks[-1] if self._marks else 0) < count:
            raise ValueError("its pickle takes values that are not there")
        return self._stack[-count:]

    def _pop(self) -> Any:
        self._take(1)
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _mark(self, _: Any) -> None:
        self._marks.append(len(self._stack))

    def _tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._pop_to_mark()))

    def _append(self, _: Any) -> None:
        self._extend([self._pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._pop_to_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self._take(1)[0]
        if type(target) is not list:
            raise ValueError("its pickle appends to something other than a list")
        target.extend(items)

    def _set_item(self, _: Any) -> None:
        value, key = self._pop(), self._pop()
        self._update([key, value])

    def _set_items(self, _: Any) -> None:
        self._update(self._pop_to_mark())

    def _update(self, items: list[Any]) -> None:
        target = self._take(1)[0]
        if type(target) is not dict or len(items) % 2:
            raise ValueError("its pickle sets items of something other than a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[check_key(key)] = value

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        path = f"{_RENAMED.get(module, module)}.{name}"
        if path not in self.functions and not self.inert.fullmatch(path):
            raise RefusedGlobalError(path.removeprefix("builtins."))
        self._stack.append(Name(path))

    def _reduce(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        if type(function) is not Name:
            raise ValueError("its pickle calls something that is not a function")
        if function.path not in self.functions:
            raise RefusedGlobalError(function.path)
        self._stack.append(call(self.functions[function.path], arguments))

    def _new_object(self, _: Any) -> None:
        arguments, function = self._pop(), self._pop()
        if function != Name("argparse.Namespace") or arguments != ():
            raise ValueError("its pickle makes an object of another class than argparse.Namespace")
        self._stack.append(argparse.Namespace())

    def _build(self, _: Any) -> None:
        state, target = self._pop(), self._take(1)[0]
        if type(target) is argparse.Namespace and type(state) is dict:
            self._spend(len(state))
            if not all(type(key) is str for key in state):
                raise ValueError("its argparse.Namespace has an entry without a name")
            vars(target).update(state)
        elif type(target) is ScalarType:
            _set_order(target, state)
        elif type(target) is not dict:  # the attributes of an OrderedDict, such as `_metadata`, are left out
            raise ValueError("its pickle changes an object that torch.save does not change")

    def _persistent(self, _: Any) -> None:
        self._stack.append(self.load_storage(self._pop()))

    def _dict(self, pairs: Any = ()) -> dict[Any, Any]:
        if type(pairs) not in (dict, list, tuple):
            raise ValueError("its OrderedDict is not made of pairs")
        self._spend(len(pairs))
        return {check_key(key): value for key, value in (pairs.items() if type(pairs) is dict else pairs)}

    def _set(self, items: Any = ()) -> set[Any]:
        if type(items) not in (list, tuple):
            raise ValueError("its set is not made of a list")
        self._spend(len(items))
        return {check_key(item) for item in items}

    def _encode(self, text: Any, encoding: Any = "latin1") -> bytes:
        """Python 3 writes bytes in protocol 2 as a call of `_codecs.encode`."""
        if type(text) is not str or encoding != "latin1":
            raise ValueError("its bytes are not written in Latin-1")
        self._spend(len(text) // 16)
        return text.encode("latin1")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
}
_LITERALS = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_HANDLERS: dict[str, Callable[[Unpickler, Any], None]] = {
    "MARK": Unpickler._mark,
    "TUPLE": Unpickler._tuple,
    "APPEND": Unpickler._append,
    "APPENDS": Unpickler._appends,
    "SETITEM": Unpickler._set_item,
    "SETITEMS": Unpickler._set_items,
    "GLOBAL": Unpickler._global,
    "REDUCE": Unpickler._reduce,
    "NEWOBJ": Unpickler._new_object,
    "BUILD": Unpickler._build,
    "BINPERSID": Unpickler._persistent,
}


def call(function: Function, arguments: Any) -> Any:
    """Calls a function with arguments of the file; raises ValueError if they are no short tuple or do not fit it."""
    if type(arguments) is not tuple or len(arguments) > 16:
        raise ValueError("its pickle calls a function without a short tuple of arguments")
    try:
        return function(*arguments)
    except (TypeError, AttributeError):
        raise ValueError("its pickle calls a function with arguments that torch.save does not give it") from None


def check_key(key: Any) -> Any:
    """Returns a key of a dict or an item of a set, if its hash is cheap; raises ValueError for others."""
    for part in key if type(key) is tuple and len(key) <= 16 else (key,):
        if type(part) not in (str, bytes, int, bool, float, type(None), Name) or (
            type(part) is int and abs(part) > _LARGEST_KEY
        ):
            raise ValueError("its dict has a key that is no text, no number and no short tuple of these")
    return key


def check_depth(content: Any) -> None:
    """Raises ValueError if containers lie deeper inside of each other than checkpoints have them."""
    level, seen = [content], {id(content)}
    for _ in range(_DEEPEST):
        parts = (part for whole in level for part in _parts(whole) if type(part) in _CONTAINERS)
        level = list({id(part): part for part in parts if id(part) not in seen}.values())
        seen |= {id(part) for part in level}
        if not level:
            return
    raise ValueError(f"it has more than {_DEEPEST} containers inside of each other")


_CONTAINERS = (dict, list, tuple, argparse.Namespace)


def _parts(whole: Any) -> Iterable[Any]:
    if type(whole) is argparse.Namespace:
        return vars(whole).values()
    if type(whole) is dict:
        return whole.values()
    return whole if type(whole) in (list, tuple) else ()


def _same_bytes(content: Any = b"") -> bytes:
    if type(content) is not bytes:
        raise ValueError("its bytearray is not made of bytes")
    return content


def _complex(real: Any, imaginary: Any) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise ValueError("its complex number is not made of two numbers")
    return complex(real, imaginary)


def _scalar_type(code: Any, align: Any = False, copy: Any = True) -> ScalarType:
    """Stands in for numpy.dtype, for plain numbers only."""
    if type(code) is not str or not _SCALAR.fullmatch(code):
        raise RefusedGlobalError(f"numpy.dtype({code[:20]!r})" if type(code) is str else "numpy.dtype")
    return ScalarType(code)


def _set_order(target: ScalarType, state: Any) -> None:
    """Takes the byte order from the state of a NumPy dtype; a dtype with fields or a shape is refused."""
    if type(state) is not tuple or len(state) != 8 or type(state[1]) is not str or state[1] not in ("<", ">", "|", "="):
        raise ValueError("its NumPy type has a state of another form")
    if type(state[0]) is not int or any(part is not None for part in state[2:5]):
        raise RefusedGlobalError("numpy.dtype with fields")
    target.order = state[1]


def _scalar(kind: Any, content: Any) -> Any:
    """Stands in for NumPy's rebuilding of a scalar: decodes exactly the bytes of one number."""
    if type(kind) is not ScalarType or type(content) is not bytes:
        raise ValueError("its NumPy scalar is not a type and bytes")
    dtype = np.dtype(kind.code)
    if kind.order == ">":
        dtype = dtype.newbyteorder(">")
    if len(content) != dtype.itemsize:
        raise ValueError(f"its NumPy scalar has {len(content)} bytes instead of {dtype.itemsize}")
    return np.frombuffer(content, dtype)[0]
