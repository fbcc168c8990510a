"""A CUDA device without a GPU: torch's fake tensors have shapes, dtypes and devices, and no values.

What runs on them computes nothing. But an operator whose tensors lie on two devices is an error, and so is whatever
needs a value: `.item()`, `if tensor`, a shape that follows from contents. `Watch` adds what fake tensors let pass:
copies between host and device that are neither pinned nor asynchronous, and, inside of a captured pass, tensors on the
host, random numbers and other arithmetic than in the compute dtype.
"""

import contextlib
import ctypes
from pathlib import Path

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_llmpq.engine.runner import host_copies

CUDA = torch.device("cuda", 0)
_TYPES, _CUDA, _META = 21, 1, 14  # c10::DeviceType
_UNFIT = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul")


class Refused(AssertionError):
    """What a GPU would bear badly, or not at all."""


@contextlib.contextmanager
def _device_guard():
    """torch without CUDA refuses operators on a device that it has no guard for. Meta's guard does nothing, too."""
    if torch.backends.cuda.is_built():
        yield
        return
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * _TYPES).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before, table[_CUDA] = table[_CUDA], table[_META]
    try:
        yield
    finally:
        table[_CUDA] = before


class _Event:
    def record(self, stream=None):
        pass

    def synchronize(self):
        pass


class Watch(TorchDispatchMode):
    """Every operator passes here. `copies`: so many went between host and device; `captured`: operators of captured
    passes."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype
        self.copies = 0
        self.captured = []
        self.in_attention = False  # torch's own, which takes another path here than on a GPU
        self._capturing = self._may_copy = False

    @contextlib.contextmanager
    def capturing(self):
        self._capturing = True
        try:
            yield
        finally:
            self._capturing = False

    @contextlib.contextmanager
    def copying(self):
        self._may_copy = True
        try:
            yield
        finally:
            self._may_copy = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        tensors = [each for each in tree_leaves((args, kwargs, found)) if isinstance(each, torch.Tensor)]
        kinds = {tensor.device.type for tensor in tensors if tensor.dim() or tensor.is_cuda}
        # a kernel of a library may take its settings from the host
        if len(kinds) > 1 and func.namespace == "aten":
            self.copies += 1
            if not self._may_copy:
                raise Refused(f"{func} copies between host and device, and waits for it")
        if self._capturing:
            self._check_captured(func, tensors, kinds)
        return found

    def _check_captured(self, func, tensors, kinds):
        self.captured.append(func)
        if "cpu" in kinds and func.namespace == "aten":
            raise Refused(f"{func} in a captured pass works on the host")
        if unfit := [tag for tag in _UNFIT if tag in func.tags]:
            raise Refused(f"{func} in a captured pass: {unfit}")
        wide = [
            each.dtype for each in tensors if each.is_floating_point() and each.dtype not in (self.dtype, torch.float)
        ]
        if wide:
            raise Refused(f"{func} in a captured pass of {self.dtype} has {wide}")
        product = func.overloadpacket.__name__ in _PRODUCTS
        if product and not self.in_attention and any(each.dtype != self.dtype for each in tensors):
            raise Refused(f"{func} in a captured pass of {self.dtype} multiplies {[each.dtype for each in tensors]}")


class _Copies(TorchFunctionMode):
    """Pinned memory by name: torch has none without a GPU. What is copied without waiting must be pinned."""

    def __init__(self, watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        pinned = kwargs.pop("pin_memory", False)
        asynchronous = kwargs.get("non_blocking") and func in (torch.Tensor.to, torch.Tensor.copy_)
        if asynchronous:
            sides = [each for each in args if isinstance(each, torch.Tensor) and not each.is_cuda]
            if not all(getattr(each, "is_named_pinned", False) for each in sides):
                raise Refused(f"{func.__name__}(non_blocking=True) of memory that is not pinned")
            if func is torch.Tensor.to and sides:
                self.watch.copies += 1
                # fake tensors of one element have a value, which cannot go where there is no device
                return torch.empty(args[0].shape, dtype=args[0].dtype, device=args[1])
        self.watch.in_attention = func is F.scaled_dot_product_attention
        with self.watch.copying() if asynchronous else contextlib.nullcontext():
            found = func(*args, **kwargs)
        self.watch.in_attention = False
        if pinned:
            found.is_named_pinned = True
        return found


def read_ones(copy):
    """In the place of `HostCopy.read`: rows chose token 1, and their logits are numbers."""
    assert not copy._values.is_cuda
    rows, columns = copy._values.shape
    return [[1] * columns] * rows


@contextlib.contextmanager
def fake_cuda(monkeypatch, dtype):
    """Inside, `CUDA` is a device, and tensors have no values; gives a `Watch`."""
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(host_copies.HostCopy, "read", read_ones)
    watch = Watch(dtype)
    with _device_guard(), FakeTensorMode(), watch, _Copies(watch):
        yield watch
