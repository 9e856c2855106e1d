"""Give a language model new languages without making it forget its own (MoE-LPR on Megatron-Core).

The names of docs/python-api.md can be imported from here. Each is loaded when it is asked for: importing the package
imports neither torch nor Megatron.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_lpr.api import compare, evaluate, export, plan, session, train, upcycle, verify
    from megatron_lpr.data.corpus.manifest import Manifest
    from megatron_lpr.data.sampler.replay_sampler import ReplaySampler
    from megatron_lpr.errors import UserError
    from megatron_lpr.recipe.reading import load_recipe
    from megatron_lpr.training.hooks.hook import Hook
    from megatron_lpr.training.train import Trainer

__version__ = "0.1.0"
__all__ = [
    "Hook",
    "Manifest",
    "ReplaySampler",
    "Trainer",
    "UserError",
    "compare",
    "evaluate",
    "export",
    "load_recipe",
    "plan",
    "session",
    "train",
    "upcycle",
    "verify",
]

_ELSEWHERE = {
    "Hook": "training.hooks.hook",
    "Manifest": "data.corpus.manifest",
    "ReplaySampler": "data.sampler.replay_sampler",
    "Trainer": "training.train",
    "UserError": "errors",
    "load_recipe": "recipe.reading",
}  # the others are in api


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "Trainer":
        from megatron_lpr.platform import prepare

        prepare()  # its module imports Megatron-Core
    return getattr(importlib.import_module(f"megatron_lpr.{_ELSEWHERE.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
