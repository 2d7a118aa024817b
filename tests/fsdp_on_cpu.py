"""For tests alone: let Accelerate run FSDP2 on CPUs, where it otherwise silently takes DDP."""

import functools

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def enable():
    """Patch Accelerate in this process, before it makes an Accelerator."""
    original = AcceleratorState.__init__

    @functools.wraps(original)
    def with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp


def start_anew():
    """Let Accelerate forget the first model of this process, whose layers it would cut in all."""
    AcceleratorState._reset_state(reset_partial_state=True)
