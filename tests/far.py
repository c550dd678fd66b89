"""A simulated device, for machines that only have a CPU. Tensors on "far" keep their numbers in CPU tensors, but refuse
to be combined with CPU tensors (except scalars), as those of cuda and mps do."""
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

aten = torch.ops.aten
# before the first backward pass of this process, because PyTorch counts its devices then
_setup_privateuseone_for_python_backend("far")
torch.far.get_amp_supported_dtype = lambda: []


class Far(torch.Tensor):
    """A tensor that says it is on "far"; its numbers are in `near`."""

    @staticmethod
    def __new__(cls, near):
        far = torch.Tensor._make_wrapper_subclass(cls, near.shape, strides=near.stride(), storage_offset=near.storage_offset(), dtype=near.dtype, device="far:0", requires_grad=near.requires_grad)
        far.near = near
        return far

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None):
        return compute(f, args, kwargs or {})

    def tolist(self):
        return self.near.tolist()


def near(x):
    return tree_map_only(Far, lambda far: far.near, x)


def compute(f, args, kwargs):
    """Run any PyTorch operation on the CPU tensors inside. The result is far if an input is far, or if it is requested
    on "far" by `device`."""
    given = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    far = any(isinstance(x, Far) for x in given)
    moves = f in (aten._to_copy.default, aten.copy_.default)
    if far and not moves and any(x.dim() and not isinstance(x, Far) for x in given):
        raise RuntimeError(f"{f}: one tensor is far, another on the CPU")
    if kwargs.get("device") is not None:
        far, kwargs = torch.device(kwargs["device"]).type == "far", {**kwargs, "device": "cpu"}
    out = f(*near(args), **near(kwargs))
    if f._schema.is_mutable:  # an in-place operation returns the tensor that it has changed
        return args[0] if isinstance(out, torch.Tensor) else out
    return tree_map_only(torch.Tensor, Far, out) if far else out


class Factories(TorchDispatchMode):
    """Sends torch.zeros(.., device="far") and the like to `compute`, too."""

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        return compute(f, args, kwargs or {})


# operations that bypass every TorchDispatchMode, as indexing by lists does
LIBRARY = torch.library.Library("aten", "IMPL")
LIBRARY.impl("empty_strided", lambda size, stride, dtype=None, **_: Far(torch.empty_strided(size, stride, dtype=dtype)), "PrivateUse1")
LIBRARY.impl("_copy_from", lambda source, target, non_blocking=False: near(target).copy_(near(source)) is None or target, "PrivateUse1")


def moved(module):
    """Move the parameters of a module to "far", in place. Returns the module."""
    for part in module.modules():
        for name, p in part._parameters.items():
            part._parameters[name] = torch.nn.Parameter(Far(p.data)) if p is not None else None
    return module
