"""The processes of a run, as accelerate starts them, and tensors that are sharded over them."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, DynamoBackend, ProjectConfiguration, parse_flag_from_env
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from common.config import InputError, LoopConfig
from common.runtime import has_fast_bfloat16, pick_device


def make_accelerator(config: LoopConfig, *, can_shard: bool = False) -> Accelerator:
    """The accelerator that `accelerate launch` or a plain start describes; seeds the global generators.

    With `can_shard` it may be set up for FSDP, which shards weights, gradients and moments over the processes.

    Raises:
        InputError: a tracker that is not installed, or settings of a launcher that are not supported.
    """
    available = sorted(str(name) for name in get_available_trackers())
    for name in config.trackers:
        if name not in available:
            raise InputError(f"tracker {name!r} is unknown or not installed; available here: {', '.join(available)}")
    precision: str = config.mixed_precision
    if precision == "auto":
        device = pick_device("cpu" if parse_flag_from_env("ACCELERATE_USE_CPU") else "auto")
        precision = "bf16" if has_fast_bfloat16(device) else "no"
    torch.manual_seed(config.seed)
    accelerator = Accelerator(
        mixed_precision=precision,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(config.output_dir, logging_dir=str(Path(config.output_dir) / "trackers")),
    )
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM) or (
        kind == DistributedType.FSDP and not can_shard
    ):
        raise InputError(f"accelerate is set up for {kind.value}, which is not supported here; launch with --multi_gpu")
    if kind == DistributedType.FSDP:
        _set_up_sharding(accelerator)
    elif parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise InputError("accelerate is set up for FSDP, which needs several processes with GPUs; omit --use_fsdp")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise InputError("accelerate is set up to compile with dynamo; launch it without, and give --compile true")
    return accelerator


def _set_up_sharding(accelerator: Accelerator) -> None:
    plugin = accelerator.state.fsdp_plugin
    unsupported = {
        "version 1": plugin.fsdp_version != 2,
        "activation_checkpointing": plugin.activation_checkpointing,
        "offload_params": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        # it may wrap the prior alone, whose weights are read without calling its forward
        "auto_wrap_policy SIZE_BASED_WRAP": plugin.auto_wrap_policy is size_based_auto_wrap_policy,
    }
    for name, asked in unsupported.items():
        if asked:
            raise InputError(f"accelerate is set up with FSDP {name}; use the settings of docs/cluster/fsdp.yaml")
    # accelerate would also sum gradients in bfloat16, and round what the model returns
    half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is, or gathered from its shards; then all processes must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor in this process, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, known to all processes, into one that may be sharded.

    Raises:
        InputError: the shapes differ.
    """
    if target.shape != source.shape:
        raise InputError(
            f"the checkpoint is damaged: a tensor of shape {[*source.shape]} in place of {[*target.shape]}"
        )
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)
