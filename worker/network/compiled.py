"""Compiled code of a CPU, called without the interpreter's lock.

torch's own loader holds the lock while the code runs, so that two threads with a part of a batch
each would take turns. The C interface of AOTInductor (`aoti_runtime/interface.h`) is called here
by ctypes, which lets go of it: on two cores twice as many rows a second.
"""

from __future__ import annotations

import ctypes
import tempfile
import weakref
import zipfile
from ctypes import c_char_p, c_int, c_size_t, c_void_p, py_object
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

_aoti: Any = torch._C._aoti
_pointer_of = ctypes.PYFUNCTYPE(c_void_p, py_object, c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_capsule_of = ctypes.PYFUNCTYPE(py_object, c_void_p, c_char_p, c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_FUNCTIONS = {
    "CreateWithDevice": (ctypes.POINTER(c_void_p), c_size_t, c_char_p, c_char_p),
    "Run": (c_void_p, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_void_p),
    "Delete": (c_void_p,),
}


class CompiledError(RuntimeError):
    """A package that cannot be used, or code that failed; torch wrote why to stderr."""


class Compiled:
    """The network of a package, (x, t, labels) → raw output, for `threads` callers at once."""

    def __init__(self, package: Path, threads: int) -> None:
        self._library = _load(package)
        self._handle = c_void_p()
        self._call("CreateWithDevice", ctypes.byref(self._handle), threads, b"cpu", None)
        # Held by the finalizer, the library lives as long as it is needed.
        weakref.finalize(self, _function(self._library, "Delete"), self._handle)

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        """The raw output; all of the sizes and types that were compiled. Raises CompiledError."""
        inputs = [v.contiguous() for v in (x, t, labels) if v is not None]
        capsules = _aoti.unsafe_alloc_void_ptrs_from_tensors(inputs)  # the code takes them over
        given = (c_void_p * len(inputs))(*(_pointer_of(capsule, None) for capsule in capsules))
        made = (c_void_p * 1)()
        self._call("Run", self._handle, given, len(inputs), made, 1, None, None)
        out: Tensor = _aoti.alloc_tensor_by_stealing_from_void_ptr(_capsule_of(made[0], None, None))
        return out

    def _call(self, name: str, *arguments: Any) -> None:
        error = _function(self._library, name)(*arguments)
        if error:
            raise CompiledError(f"AOTInductor's {name} failed ({error})")


def _function(library: ctypes.CDLL, name: str) -> Any:
    function = getattr(library, f"AOTInductorModelContainer{name}")
    function.argtypes, function.restype = _FUNCTIONS[name], c_int
    return function


def _load(package: Path) -> ctypes.CDLL:
    with zipfile.ZipFile(package) as archive:
        names = [PurePosixPath(name) for name in archive.namelist()]
        libraries = [name for name in names if name.suffix == ".so"]
        if len(libraries) != 1:
            raise CompiledError(f"{package}: {len(libraries)} libraries in it, not one")
        # Of operations without a C interface; they would need an executor of torch's.
        if any("extern_kernel" in name.name for name in names):
            raise CompiledError(f"{package}: has operations that only torch can call")
        with tempfile.TemporaryDirectory() as folder:
            return ctypes.CDLL(archive.extract(str(libraries[0]), folder))
