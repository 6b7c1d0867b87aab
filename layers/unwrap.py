"""The model inside its wrappers: unwrap(model) of DDP, FSDP or torch.compile."""
from __future__ import annotations

from typing import Any

from config import refuse_to_run


def unwrap(model: Any) -> Any:
    """Return the model inside DDP and torch.compile, whose wrappers would get into the names."""
    while hasattr(model, "_orig_mod") or not hasattr(model, "config"):
        model = getattr(model, "_orig_mod", None) or model.module
    return model


if __name__ == "__main__":
    refuse_to_run()
