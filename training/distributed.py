"""The processes of a run, as accelerate starts them: their set-up, sharded tensors made whole, a vote to stop."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    ProjectConfiguration,
    parse_flag_from_env,
)
from torch import Tensor
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.distributed.tensor import DTensor, distribute_tensor

from common.config import LoopConfig
from common.errors import InputError
from common.runtime import has_fast_bfloat16, pick_device

PATIENCE = timedelta(hours=6)  # of the others while the main process evaluates or saves; all else has torch's limits
UNSUPPORTED = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


def make_accelerator(config: LoopConfig, *, can_shard: bool = False) -> Accelerator:
    """The accelerator that `accelerate launch` or a plain start describes; seeds the global generators.

    Args:
        config: the shared settings.
        can_shard: whether FSDP may be asked for, which shards weights, gradients and moments over the processes.

    Raises:
        InputError: a tracker that accelerate does not know, or whose package is not installed, or a launcher's
            settings that would be ignored.
    """
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    available = {str(name) for name in get_available_trackers()}
    for name in config.trackers:
        if name not in known:
            raise InputError(f"tracker {name!r} is unknown; allowed: {', '.join(known)}")
        if name not in available:
            raise InputError(f"tracker {name} is not installed; pip install {name}, or leave it out of --trackers")
    chosen: str = config.mixed_precision
    if chosen == "auto":
        device = pick_device("cpu" if parse_flag_from_env("ACCELERATE_USE_CPU") else "auto")
        chosen = "bf16" if has_fast_bfloat16(device) else "no"
    torch.manual_seed(config.seed)
    folders = ProjectConfiguration(project_dir=config.output_dir, logging_dir=str(Path(config.output_dir) / "trackers"))
    accelerator = Accelerator(
        mixed_precision=chosen,
        log_with=list(config.trackers) or None,
        project_config=folders,
    )
    unsupported = UNSUPPORTED if can_shard else (*UNSUPPORTED, DistributedType.FSDP)
    if accelerator.distributed_type in unsupported:
        kind = accelerator.distributed_type.value
        raise InputError(
            f"accelerate is set up for {kind}, which this script does not know; launch it with --multi_gpu"
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        _set_up_sharding(accelerator)
    elif parse_flag_from_env("ACCELERATE_USE_FSDP"):
        raise InputError("accelerate is set up for FSDP, which needs several processes with GPUs; omit --use_fsdp")
    if accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
        raise InputError("accelerate is set up to compile with dynamo; launch it without, and give --compile true")
    return accelerator


def _set_up_sharding(accelerator: Accelerator) -> None:
    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise InputError("accelerate is set up for FSDP 1; launch with --fsdp_version 2, see docs/cluster/fsdp.yaml")
    offloads = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
    by_size = plugin.auto_wrap_policy is size_based_auto_wrap_policy
    refused = {
        "activation_checkpointing": (plugin.activation_checkpointing, "--gradient-checkpointing true"),
        "offload_params": (offloads, "more GPUs"),
        # it may wrap the prior alone, whose weights are read without calling its forward
        "auto_wrap_policy SIZE_BASED_WRAP": (by_size, "TRANSFORMER_BASED_WRAP"),
    }
    for name, (asked, instead) in refused.items():
        if asked:
            raise InputError(f"accelerate is set up with fsdp_{name}; launch without it, and use {instead} instead")
    # accelerate would also add gradients up in bfloat16, and round what the model returns
    half = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)


def whole(tensor: Tensor) -> Tensor:
    """A tensor as it is, or put together from its shards; then all processes must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_into(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor, known to all processes, into one that may be sharded."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device), target.device_mesh, target.placements)
    target.copy_(source)


class Processes:
    """Communication between the processes of a run beside gradients; on the CPU, so that none waits for a GPU."""

    def __init__(self, accelerator: Accelerator):
        several = accelerator.num_processes > 1
        self._votes: Any = dist.new_group(backend="gloo") if several else None
        self._waits: Any = dist.new_group(backend="gloo", timeout=PATIENCE) if several else None

    def any(self, asked: bool) -> bool:
        """Whether it is true in any process; all of them must call."""
        if self._votes is None:
            return asked
        ballot = torch.tensor(float(asked))
        dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._votes)
        return bool(ballot)

    def wait(self) -> None:
        """Wait for all, also where the main process has something long to do."""
        if self._waits is not None:
            dist.all_reduce(torch.zeros(()), group=self._waits)
