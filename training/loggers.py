"""Find the packages that --wandb_log and --tensorboard ask for, before any training."""
from __future__ import annotations

import importlib
from typing import Any

from config import UserError


def find_logger(flag: str, module: str, name: str, package: str) -> Any:
    """Return a module that has `name`; UserError if its package is not installed.

    A folder that an earlier run left, such as ./wandb, is imported as an empty package where the
    real one is missing: so what counts is that the name is there.
    """
    try:
        found = importlib.import_module(module)
        getattr(found, name)
        return found
    except (ImportError, AttributeError) as e:
        raise UserError(f"--{flag} needs the package {package}, which is not installed here "
                        f"({type(e).__name__}): pip install {package}, or leave "
                        f"out --{flag}") from e


def find_loggers(cfg: Any) -> tuple[Any, Any]:
    """Return the modules (wandb, torch.utils.tensorboard), None for what is not asked for."""
    wandb = find_logger("wandb_log", "wandb", "init", "wandb") if cfg.wandb_log else None
    board = find_logger("tensorboard", "torch.utils.tensorboard", "SummaryWriter",
                        "tensorboard") if cfg.tensorboard else None
    return wandb, board
