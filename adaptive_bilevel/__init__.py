"""Automatic step sizes for bilevel optimization."""
