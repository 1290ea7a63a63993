"""A GPU made of CPU memory: shows, without a GPU, where tensors of the host and of the device would meet.

A tensor on it is a wrapper that names the device `pretended:0` and holds a CPU tensor. Every operator passes through
`operator`, which computes on the CPU and refuses what a GPU refuses: an operand on each side. It also refuses what a
GPU does in silence and slowly, an index from the host. Values read back are counted, since each waits for the device.

`use(monkeypatch)` makes it the device of every model that is loaded. Importing this file registers the device with
torch for good, so tests import it in a process of their own. Left out: other threads (--overlap), a forward within the
backward (--recompute, which torch aborts here), streams, memory limits, our own kernels and FlashAttention (stand-ins
in torch take their place), and all that only hardware can get wrong.
"""

from functools import wraps

import torch
from torch.distributed.checkpoint import filesystem
from torch.nn.attention import varlen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import kernels.elementwise
import kernels.triton_decode_attention
import kernels.triton_linear_logprob
import training.adamw
import weights
from kernels.decode_attention import torch_decode_attention
from tests.test_kernels import reference
from tests.test_model import use_torch_stand_in

_setup_privateuseone_for_python_backend("pretended")
DEVICE = torch.device("pretended", 0)
COUNTS = {"reads": 0, "kernels": 0, "varlen": 0, "synchronized": 0}
aten = torch.ops.aten
TRANSFERS = (aten._to_copy.default, aten.copy_.default)
READS = (aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default)
TAKE_NUMBERS = (aten.index_put, aten.index_put_, aten.masked_fill, aten.masked_fill_, aten.where, aten.fill, aten.fill_)


class Mixed(RuntimeError):
    """Tensors of the host and of the device in one operator."""


class OnDevice(torch.Tensor):
    """Says that it lies on the device, and on a GPU; `host` holds its numbers."""

    @staticmethod
    def __new__(cls, host: torch.Tensor):
        with torch.inference_mode(False):               # a view is of the same kind as its base
            return torch.Tensor._make_wrapper_subclass(
                cls, host.shape, host.stride(), host.storage_offset(), dtype=host.dtype, device=DEVICE)

    def __init__(self, host: torch.Tensor):
        self.host = host

    def __repr__(self):
        return f"OnDevice({self.host!r})"

    @property
    def is_cuda(self):
        return True

    def tolist(self):
        COUNTS["reads"] += 1
        return self.host.tolist()

    def untyped_storage(self):
        return self.host.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return operator(func, args, kwargs or {})


def operator(func, args, kwargs):
    """One operator, computed on the CPU, its results where a GPU would leave them. Raises Mixed."""
    if func.overloadpacket is aten.to:                  # in inference mode it comes undivided
        with Operators():
            return func.decompose(*args, **kwargs)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if isinstance(x, OnDevice)]
    arguments = [*zip(func._schema.arguments, args, strict=False)]
    written = [id(x) for told, x in arguments if told.is_write for x in tree_leaves(x)] + [id(kwargs.get("out"))]
    with_numbers = torch.Tag.pointwise in func.tags or func.overloadpacket in TAKE_NUMBERS
    theirs = [x for x in tensors if x.device.type == "cpu" and (x.dim() or not with_numbers or id(x) in written)]
    if ours and theirs and func not in TRANSFERS:
        raise Mixed(f"{func}: {len(ours)} operands on the device, one of shape {list(theirs[0].shape)} on the host")
    asked = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
    stays = asked == DEVICE.type or asked is None and bool(ours)
    COUNTS["reads"] += bool(ours) and (func in READS or not stays)
    if asked == DEVICE.type:
        kwargs = kwargs | {"device": torch.device("cpu")}
    given = tree_map(lambda x: x.host if isinstance(x, OnDevice) else x, (args, kwargs))
    out = func(*given[0], **given[1])
    if not stays:
        return out
    out = tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, out)
    return return_and_correct_aliasing(func, args, kwargs, out)


class Operators(TorchDispatchMode):
    """Sends the operators that have no operand on the device yet: torch.zeros(3, device=DEVICE)."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return operator(func, args, kwargs or {})


class Functions(TorchFunctionMode):
    """torch.tensor fills the device's memory in C++, before any operator: here it makes a copy of the host's."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu") == DEVICE:
            kwargs.pop("device")
            return func(*args, **kwargs).to(DEVICE)
        return func(*args, **kwargs)


def counted(name: str, function):
    @wraps(function)
    def call(*args, **kwargs):
        COUNTS[name] += 1
        return function(*args, **kwargs)

    return call


def use(monkeypatch, capability=(9, 0)) -> tuple:
    """Makes the pretended device that of every model. Returns the contexts to enter, and sets COUNTS to 0."""
    def kernel(hidden, weight, targets, temperature=1.0, softcap=None):
        return reference(hidden, weight, targets, temperature, softcap, dtype=torch.float32)

    def decode(q, k, v, row_kv, prefix_kv, rows, scale, window=0):
        T, P = int(rows.lengths.host.max()) + 1, int(rows.prefix_lengths.host.max())
        row_kv, prefix_kv = ([x[:, :, :width] for x in pair] for pair, width in ((row_kv, T), (prefix_kv, P)))
        return torch_decode_attention(q, k, v, row_kv, prefix_kv, rows, scale, window)

    COUNTS.update(dict.fromkeys(COUNTS, 0))
    use_torch_stand_in(monkeypatch)
    monkeypatch.setattr(varlen, "varlen_attn", counted("varlen", varlen.varlen_attn))
    monkeypatch.setattr(weights, "pick_device", lambda name: str(DEVICE))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(kernels.triton_linear_logprob, "triton_linear_logprob", counted("kernels", kernel))
    monkeypatch.setattr(kernels.triton_decode_attention, "triton_decode_attention", decode)
    monkeypatch.setattr(kernels.elementwise, "fused", lambda x: kernels.native.usable(x))
    monkeypatch.setattr(training.adamw, "in_triton", lambda weight, state: False)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    monkeypatch.setattr(torch.pretended, "synchronize", counted("synchronized", lambda: None), raising=False)
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader",                    # it wants streams
                        lambda resolve, **_: filesystem._SerialCpuLoader(resolve))
    return Functions(), Operators(), torch.autograd.set_multithreading_enabled(False)
