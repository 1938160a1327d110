"""What the code of a forward says, and a trace of it does not: questions that a trace answers once and for all.

A trace shows which operations a forward does, but neither `x is y` nor `type(x)`. So every Python function that is
called during a trace (of the user's and of the libraries that are not torch's) is read before it runs.
"""

import builtins
import contextlib
import dis
import functools
import inspect
import sys
import types
from typing import Any, NamedTuple

import torch
import torch.utils.checkpoint
from torch import nn
from torch.fx.proxy import Proxy


class Step(NamedTuple):
    """An instruction. joined: another one than the one before it may lead to it."""

    name: str
    value: Any
    joined: bool


class Code:
    """What a code object says, whoever runs it.

    names: whatever it may ask an object for, as attribute or key. variables: the global ones that it reads or writes.
    free: the variables of the functions around it.
    """

    def __init__(self, code: types.CodeType) -> None:
        self.code, self.steps = code, _steps(code)
        self.variables = {step.value for step in self.steps if step.name.endswith(("_GLOBAL", "_NAME"))}
        self.names = {*code.co_names, *(one for one in code.co_consts if isinstance(one, str))}
        self.free = [name for name in code.co_freevars if name != "__class__"]
        self.arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self.stores: dict[str, list[int]] = {}
        for i, step in enumerate(self.steps):
            if step.name.startswith(("STORE_FAST", "STORE_DEREF")):
                self.stores.setdefault(step.value, []).append(i)

    def chain(self, end: int) -> tuple[int, list[str]] | None:
        """Where the expression a.b.c begins whose last step this is, and ["b", "c"]. None: it is no such thing."""
        attributes: list[str] = []
        begin = end
        while begin >= 0 and self.steps[begin].name == "LOAD_ATTR":
            attributes.insert(0, self.steps[begin].value)
            begin -= 1
        if begin < 0 or not self.steps[begin].name.startswith(_VARIABLES):
            return None
        # b if c else d ends like d.
        return None if any(step.joined for step in self.steps[begin + 1 : end + 2]) else (begin, attributes)


_VARIABLES = ("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_CONST", "LOAD_SMALL_INT")
_SAYS_NOTHING = {"CACHE", "NOP", "RESUME", "PRECALL", "PUSH_NULL", "COPY_FREE_VARS", "EXTENDED_ARG", "NOT_TAKEN"}


def _steps(code: types.CodeType) -> list[Step]:
    steps, joined = [], False
    for one in dis.get_instructions(code):
        joined = joined or one.is_jump_target
        if one.opname in _SAYS_NOTHING:
            continue
        if isinstance(one.argval, tuple) and one.opname.count("_FAST") == 2:  # two in one, from Python 3.13 on
            first = "STORE_FAST" if one.opname.startswith("STORE") else "LOAD_FAST"
            second = "STORE_FAST" if one.opname.endswith("STORE_FAST") else "LOAD_FAST"
            steps += [Step(first, one.argval[0], joined), Step(second, one.argval[1], False)]
        else:
            steps.append(Step(one.opname, one.argval, joined))
        joined = False
    return steps


@functools.lru_cache(4096)
def code_of(code: types.CodeType) -> Code:
    return Code(code)


# ---- whose code it is ------------------------------------------------------------------------------------------------

_OURS = ("torch", "fastops")
LIBRARY = frozenset(sys.stdlib_module_names) - {"test", "__main__"}


def module_of(frame: types.FrameType) -> str:
    return frame.f_globals.get("__name__") or ""


def _package(function: types.FunctionType) -> str:
    return (function.__module__ or "").partition(".")[0]


def is_ours(frame: types.FrameType) -> bool:
    return module_of(frame).partition(".")[0] in _OURS or frame.f_code.co_filename == "<fastops.fuse>"


def asking(frame: types.FrameType) -> types.FrameType:
    """Who asks: this function, or if it is of Python's library, the one that has called it."""
    while module_of(frame).partition(".")[0] in LIBRARY and frame.f_back is not None:
        frame = frame.f_back
    return frame


def is_users(frame: types.FrameType | None) -> bool:
    return frame is not None and not is_ours(frame) and module_of(frame).partition(".")[0] not in LIBRARY


# ---- what is asked for by a call -------------------------------------------------------------------------------------


def _codes() -> dict[int, str]:
    block = "its forward has a block such as no_grad, autocast or checkpoint"
    mode = "its forward asks for a setting of PyTorch's, or changes it"
    own = "its forward goes through its parameters or buffers"
    found = {
        torch.no_grad.__enter__: block,
        torch.enable_grad.__enter__: block,
        torch.set_grad_enabled.__init__: block,
        torch.inference_mode.__enter__: block,
        torch.autocast.__enter__: block,
        torch.utils.checkpoint.checkpoint: block,
        torch.utils.checkpoint.checkpoint_sequential: block,
        torch.autograd.graph.saved_tensors_hooks.__enter__: block,
        torch.random.fork_rng: block,
        torch.nn.attention.sdpa_kernel: block,
        torch.overrides.is_tensor_like: "its forward asks for the type of an input",
        torch.typename: "its forward asks for the type of an input",
        contextlib.suppress.__enter__: "its forward catches exceptions",
        nn.Module._named_members: own,
        nn.Module.state_dict: own,
    }
    found |= {getattr(torch, name): mode for name in _SETTINGS if isinstance(getattr(torch, name), types.FunctionType)}
    return {id(inspect.unwrap(function).__code__): why for function, why in found.items()}


_SETTINGS = [
    name
    for name in dir(torch)
    if name.startswith(("is_", "get_", "set_", "are_", "use_", "initial_", "manual_"))
    and any(part in name for part in ("autocast", "grad_enabled", "inference_mode", "default", "_num_", "anomaly",
                                      "deterministic", "denormal", "rng", "seed", "warn", "precision"))
]  # fmt: skip
_CODES = _codes()
_SETTING_FUNCTIONS = {getattr(torch, name) for name in _SETTINGS} | {
    function
    for name, function in vars(torch._C).items()
    if any(part in name for part in ("autocast", "grad_enabled", "inference_mode", "default_dtype", "_num_threads"))
    and isinstance(function, types.BuiltinFunctionType)
}

# What these do is no operation: a trace does it once.
_EFFECTS = {
    "_io", "_thread", "_queue", "_random", "_socket", "_warnings", "posix", "nt", "time", "os", "logging", "warnings",
    "datetime", "uuid", "secrets", "threading", "subprocess", "socket", "random", "inspect", "pathlib", "queue",
    "multiprocessing", "concurrent", "asyncio", "contextvars", "_contextvars", "gc", "weakref",
}  # fmt: skip
_BUILTINS = {print, input, open, exec, eval, compile, globals, locals, vars, breakpoint}


def objection_to_call(frame: types.FrameType) -> str:
    """Why a call of this Python function is in the way of a trace; "" where it is not."""
    why = _CODES.get(id(frame.f_code))
    caller = frame.f_back
    if why:
        while caller is not None and module_of(caller) in (module_of(frame), "torch.utils._contextlib", "contextlib"):
            decorated = caller.f_locals.get("func")  # as @torch.no_grad() does
            if isinstance(decorated, types.FunctionType) and _package(decorated) not in (*_OURS, *LIBRARY):
                return why
            caller = caller.f_back
        return "" if caller is None or module_of(caller).startswith(("torch.fx", "fastops")) else why
    package = module_of(frame).partition(".")[0]
    if package == "os" and caller is not None:  # os.environ.get is a mapping's
        caller = asking(caller)
    if not is_users(caller) or package not in LIBRARY:
        return ""
    if package in _EFFECTS:
        return f"its forward calls {package}"
    if any(issubclass(type(value), Proxy) for value in frame.f_locals.values()) and package in ("copy", "pickle"):
        return f"its forward calls {package}"
    return ""


def objection_to_builtin(frame: types.FrameType, function: Any) -> str:
    """The same for a function that is not written in Python, by the frame that calls it."""
    if not is_users(frame):
        return ""
    owner = getattr(function, "__self__", None)
    package = owner.__name__ if isinstance(owner, types.ModuleType) else type(owner).__module__
    if package.partition(".")[0] in _EFFECTS or function in _BUILTINS:
        return f"its forward calls {function.__name__}"
    if isinstance(function, types.BuiltinFunctionType) and function in _SETTING_FUNCTIONS:
        return "its forward asks for a setting of PyTorch's, or changes it"
    return ""


# ---- what is asked for by an instruction -----------------------------------------------------------------------------


def objection_to_code(frame: types.FrameType) -> str:
    """Why a trace of this function may be wrong, by what it would do with what it is given; "" where it may not."""
    code = code_of(frame.f_code)
    given = _Given(frame, code)
    for i, step in enumerate(code.steps):
        if step.name in ("CHECK_EXC_MATCH", "JUMP_IF_NOT_EXC_MATCH", "CHECK_EG_MATCH"):
            return "its forward catches exceptions"
        if step.name == "PUSH_EXC_INFO" and code.steps[i + 1].name == "POP_TOP":
            return "its forward catches exceptions"
        if step.name in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            return f"its forward changes {step.value}, which is not its own"
        if step.name in ("STORE_DEREF", "DELETE_DEREF") and step.value in code.free and not is_inner(frame):
            return f"its forward changes {step.value}, which is not its own"
        if step.name in ("MATCH_SEQUENCE", "MATCH_MAPPING", "MATCH_CLASS"):
            return "its forward asks for the type of an input"
        if step.name == "IMPORT_NAME" and step.value.partition(".")[0] not in (*_OURS, *LIBRARY):
            return "its forward imports a module"
        if step.name in ("LOAD_ATTR", "LOAD_METHOD") and step.value in ("__dict__", "_parameters", "_buffers"):
            return "its forward goes through its parameters or buffers"
        if step.name == "IS_OP" and not _is_none(code, i - 1) and not _is_none_first(code, i):
            second = code.chain(i - 1)
            first = code.chain(second[0] - 1) if second else None
            if not (first and given.settled(*first) and given.settled(*second)):
                return "its forward asks whether two things are the same object"
        if step.name in ("LOAD_GLOBAL", "LOAD_NAME") and _asked(frame, step.value) and not given.about(i + 1):
            return _ABOUT[step.value]
    return ""


_ABOUT = {
    "type": "its forward asks for the type of an input",
    "callable": "its forward asks for the type of an input",
    "id": "its forward asks whether two things are the same object",
}


def _asked(frame: types.FrameType, name: str) -> bool:
    return name in _ABOUT and frame.f_globals.get(name) is None and hasattr(builtins, name)


def is_inner(frame: types.FrameType) -> bool:
    """Whether it is one of a function that another one has made which is being traced."""
    code, around = frame.f_code, frame.f_back
    while around is not None and not (module_of(around) == "fastops._tracing" and around.f_code.co_name == "_trace"):
        if any(one is code for one in around.f_code.co_consts):
            return True
        around = around.f_back
    return False


class _Given:
    """What the variables of a function stand for when it begins to run."""

    def __init__(self, frame: types.FrameType, code: Code) -> None:
        self.frame, self.code, self.locals = frame, code, frame.f_locals

    def about(self, begin: int) -> bool:
        """Whether the argument of a call is settled whose first step this is."""
        end = begin
        while end + 1 < len(self.code.steps) and self.code.steps[end + 1].name == "LOAD_ATTR":
            end += 1
        chain = self.code.chain(end)
        called = end + 1 < len(self.code.steps) and self.code.steps[end + 1].name.startswith("CALL")
        return called and chain is not None and chain[0] == begin and self.settled(*chain)

    def settled(self, begin: int, attributes: list[str], depth: int = 0) -> bool:
        """Whether a.b.c is the same at every call: no input, and made of none."""
        step = self.code.steps[begin]
        if step.name.startswith(("LOAD_CONST", "LOAD_SMALL_INT")):
            return True
        if step.name in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = self.frame.f_globals.get(step.value, getattr(builtins, step.value, None))
        elif step.value in self.code.stores:
            chains = [self.code.chain(i - 1) for i in self.code.stores[step.value]]
            return depth < 4 and all(
                one is not None and self.settled(one[0], [*one[1], *attributes], depth + 1) for one in chains
            ) and step.value not in self.code.arguments  # fmt: skip
        elif step.value in self.locals:
            value = self.locals[step.value]
        else:
            return False
        for name in attributes:
            if isinstance(value, nn.Module):
                value = _of_module(value, name)
            elif not issubclass(type(value), Proxy):
                value = inspect.getattr_static(value, name, None)
            if isinstance(value, (property, functools.cached_property)):
                return False
        return not issubclass(type(value), (Proxy, torch.Tensor, tuple, list, dict))


def _of_module(module: nn.Module, name: str) -> Any:
    for place in (vars(module), module._parameters, module._buffers, module._modules):
        if name in place:
            return place[name]
    return inspect.getattr_static(type(module), name, None)


# ---- None ------------------------------------------------------------------------------------------------------------


def _is_none(code: Code, i: int) -> bool:
    return code.steps[i].name == "LOAD_CONST" and code.steps[i].value is None


def _is_none_first(code: Code, i: int) -> bool:
    """None is x."""
    chain = code.chain(i - 1)
    return chain is not None and _is_none(code, chain[0] - 1)


def settled_names(frame: types.FrameType) -> frozenset[str]:
    """The variables of a function that hold no input, whatever it does."""
    code = code_of(frame.f_code)
    plain = [name for name, value in frame.f_locals.items() if not issubclass(type(value), (Proxy, tuple, list, dict))]
    return frozenset(name for name in plain if name not in code.stores and frame.f_locals[name] is not None)


def asks_for_none(code: Code, settled: frozenset[str], of_arguments: bool, of_others: bool) -> bool:
    """Whether it asks if its arguments, or if other things that a trace has made, are None.

    A trace cannot tell: what it gives a forward is never None.
    """
    for i, step in enumerate(code.steps):
        if step.name == "IS_OP" and _is_none(code, i - 1):
            end = i - 2
        elif (step.name == "IS_OP" and _is_none_first(code, i)) or ("JUMP" in step.name and "NONE" in step.name):
            end = i - 1
        else:
            continue
        chain = code.chain(end)
        if chain is None:
            asked = of_others
        else:
            begin, attributes = chain
            variable = code.steps[begin]
            local = variable.name.startswith(("LOAD_FAST", "LOAD_DEREF")) and variable.value not in settled
            argument = variable.value in code.arguments or variable.value not in code.stores
            made = variable.value in code.stores or attributes
            asked = local and ((of_arguments and argument) or (of_others and bool(made)))
        if asked:
            return True
    return False


# ---- text ------------------------------------------------------------------------------------------------------------


def is_for_an_assertion(frame: types.FrameType) -> bool:
    """Whether the text that this function is about to make is a message that nobody sees if all is well."""
    return bool({"_assert", "_check", "_check_with"} & set(frame.f_code.co_names))


def reads_directly(frame: types.FrameType) -> bool:
    """Whether this function is at x.name, not at hasattr(x, name) or getattr(x, name)."""
    name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
    return name.startswith(("LOAD_ATTR", "LOAD_METHOD"))
