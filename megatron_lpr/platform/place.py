"""Where a rank stands in the layout of a model: which slice of each parameter is its own."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RankPlace:
    """Rank and size along each parallel dimension that cuts parameters.

    tp: tensor parallel, outside the new experts. ep: the new experts are divided over these ranks. etp: tensor parallel
    inside a new expert.
    """

    tp_rank: int = 0
    tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1

    def cut(self, role: str) -> tuple[int, int]:
        """Which slice of a parameter is this rank's, and of how many; role: as families/mappings.py has it."""
        if role == "frozen_expert":
            return 0, 1
        return (self.etp_rank, self.etp_size) if role == "new_expert" else (self.tp_rank, self.tp_size)

    @classmethod
    def of_this_rank(cls) -> "RankPlace":
        """As Megatron's process groups have it, which must be there."""
        from megatron.core import parallel_state

        return cls(
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=parallel_state.get_tensor_model_parallel_world_size(),
            ep_rank=parallel_state.get_expert_model_parallel_rank(),
            ep_size=parallel_state.get_expert_model_parallel_world_size(),
            etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
            etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
        )
