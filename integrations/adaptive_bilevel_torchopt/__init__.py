"""Automatic step sizes for TorchOpt's implicit solvers and gradient transformations."""
