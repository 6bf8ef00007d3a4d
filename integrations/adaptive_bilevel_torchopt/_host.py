"""TorchOpt itself, or the command that installs it."""

from __future__ import annotations

from adaptive_bilevel.errors import pass_over

__all__ = ["torchopt"]

try:
    import torchopt
except ImportError as error:
    if error.name != "torchopt":  # it is installed, and to install it again would change nothing
        raise ImportError(
            f"adaptive_bilevel_torchopt: TorchOpt is installed, but importing it failed: {error}"
        ) from error
    raise ImportError(
        "adaptive_bilevel_torchopt needs TorchOpt, which is not installed here. Run\n\n"
        "    pip install 'adaptive-bilevel[torchopt]'\n"
    ) from error

pass_over("torchopt", "adaptive_bilevel_torchopt")
