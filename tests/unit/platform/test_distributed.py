"""Ranks from the environments of torchrun and Slurm, and joining alone."""

import pytest

from megatron_lpr.errors import UserError
from megatron_lpr.platform import Ranks
from megatron_lpr.recipe.settings import ParallelConfig
from megatron_lpr.signals import among_ranks

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SLURM = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
MASTER = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def ranks(monkeypatch):
    def ranks(**environment):
        for name in (*NAMES, *SLURM):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return Ranks.from_environment()

    return ranks


def test_alone(ranks):
    assert ranks() == Ranks(rank=0, local_rank=0, world_size=1)


def test_torchrun(ranks):
    environment = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"} | MASTER
    assert ranks(**environment) == Ranks(rank=5, local_rank=1, world_size=8)


def test_slurm_step(ranks):
    environment = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8"} | MASTER
    assert ranks(**environment) == Ranks(rank=5, local_rank=1, world_size=8)


def test_torchrun_inside_slurm_wins(ranks):
    environment = {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2"} | MASTER
    environment |= {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8"}
    assert ranks(**environment).world_size == 8


def test_slurm_batch_shell_is_alone(ranks):
    assert ranks(SLURM_PROCID="0", SLURM_LOCALID="0").world_size == 1
    assert ranks(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_STEP_NUM_TASKS="1").world_size == 1


@pytest.mark.parametrize("missing", [*NAMES[1:]])
def test_incomplete_environment_names_what_is_missing(ranks, missing):
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"} | MASTER
    del environment[missing]
    with pytest.raises(UserError, match=f"needs the environment variables {missing}: "):
        ranks(**environment)


def test_a_process_can_join_again_after_an_error(ranks):
    import torch.distributed as dist

    from megatron_lpr.platform import megatron

    ranks()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), megatron() as joined:
            assert joined.world_size == dist.get_world_size() == 1
            raise ZeroDivisionError
        assert not dist.is_initialized()


def test_a_megatron_that_cannot_be_used_is_told(ranks, monkeypatch):
    """Leaving a process group takes Megatron, and would fail in its place."""
    import torch.distributed as dist

    from megatron_lpr.platform import distributed

    def refuse():
        raise UserError("Transformer Engine does not load")

    ranks()
    monkeypatch.setattr(distributed, "prepare", refuse)
    monkeypatch.setattr(distributed, "leave", lambda: pytest.fail("there is nothing to leave"))
    with pytest.raises(UserError, match="does not load"), distributed.megatron():
        pass
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("RANK", "", "RANK: '' is no number"),
        ("WORLD_SIZE", "two", "WORLD_SIZE: 'two' is no number"),
        ("RANK", "2", "RANK: is 2, but WORLD_SIZE is 2"),
        ("MASTER_PORT", "abc", "MASTER_PORT: 'abc' is no number"),
        ("MASTER_PORT", "99999", "MASTER_PORT: '99999' is no port"),
    ],
)
def test_variables_that_make_no_sense_are_named(ranks, name, value, told):
    environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"} | MASTER
    with pytest.raises(UserError, match=told):
        ranks(**environment | {name: value})
    with pytest.raises(UserError, match="SLURM_STEP_NUM_TASKS: 'x' is no number"):
        ranks(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="x")


@pytest.mark.parametrize(("value", "among"), [("", False), ("x", False), ("1", False), ("2", True)])
def test_a_signal_meets_any_environment(ranks, monkeypatch, value, among):
    ranks()
    monkeypatch.setenv("WORLD_SIZE", value)
    assert among_ranks() is among


def test_a_network_that_gloo_cannot_have(ranks, monkeypatch):
    """As where lo is down; without a GPU alone."""
    from megatron_lpr.platform import distributed

    ranks()
    monkeypatch.setattr(distributed, "backend", lambda: "gloo")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothing0")
    with pytest.raises(UserError, match=r"gloo cannot be started here \(.*nothing0\.?\)"):
        distributed.join()


@pytest.mark.megatron
@pytest.mark.parametrize(
    "missed", ["[enforce fail at loop.cc:48] rv != -1. pipe: Too many open files", "Resource temporarily unavailable"]
)
def test_groups_of_megatron_that_gloo_cannot_make(ranks, monkeypatch, missed):
    """Those come after the first, and take more open files and threads."""
    from megatron_lpr.platform import megatron

    def refuse(**sizes):
        raise RuntimeError(missed)

    ranks()
    with megatron():
        from megatron.core import parallel_state

        from megatron_lpr.model.builder import init_model_parallel

        monkeypatch.setattr(parallel_state, "initialize_model_parallel", refuse)
        with pytest.raises(UserError, match=rf"gloo cannot be started here \(.*{missed[-20:]}\)"):
            init_model_parallel(ParallelConfig())
