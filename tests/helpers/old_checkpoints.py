"""Checkpoints as they were written up to version 3 of run.json: Megatron's own form of the optimizer's state."""

import contextlib
from collections.abc import Iterator
from unittest.mock import patch

from megatron_lpr.checkpoint import content, save
from megatron_lpr.platform.shims import cuda_type_names


@contextlib.contextmanager
def written_as_before(optimizer) -> Iterator[None]:
    """Inside it a save of this optimizer is an older version's."""
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}

    def with_optimizer(chunks, held):
        state = content.model_state(chunks, held)
        model = state["model0"] if "model1" not in state else dict(state)
        with cuda_type_names():
            state["optimizer"] = optimizer.sharded_state_dict(model, is_loading=False, metadata=metadata)
        return state

    with patch.object(save, "model_state", with_optimizer), patch.object(save, "written_state", lambda *_: ([], [])):
        yield
