"""Automatic step sizes for the problems of Betty's engine."""
