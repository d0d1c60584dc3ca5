"""A frozen base whose weights lie in parts on several ranks (FSDP2), for one that does not fit on one of them.

Each decoder layer is gathered when it is needed, forward and backward, and dropped again. Adapters are attached after
this, as to any base: their factors are small and lie whole on every rank, where each rank's gradient of its own
answers is summed as without sharding (sdpo_core.ranks), and where saving needs nobody else.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

OBSTACLE = "the base is sharded over ranks"


def shard_base(model: nn.Module, device: torch.device, size: int) -> None:
    """Spread the weights of a Transformers model, in place, over the default process group. Raises ValueError for a
    model whose layers are not found. The model may lie on the CPU: it goes to `device` layer by layer."""
    layers = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not layers:
        raise ValueError(f"a {type(model).__name__} cannot be sharded: it has no list of layers")
    model.requires_grad_(False)
    mesh = init_device_mesh(device.type, (size,))
    for layer in max(layers, key=_weights):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "forward")  # PEFT calls `forward` itself, past the module's hooks


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def held_bytes(model: nn.Module) -> int:
    """Of weights that lie on this rank."""
    parts = (p.to_local() if isinstance(p, DTensor) else p for p in model.parameters())
    return sum(part.untyped_storage().nbytes() for part in parts)


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
