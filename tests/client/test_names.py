"""The public names of the package."""

from __future__ import annotations

import importlib.metadata

import asynq_aio
from asynq_aio import errors


def test_every_name_is_there_and_in_order() -> None:
    """Sorted, so that one finds it; and each exists."""
    assert asynq_aio.__all__ == sorted(asynq_aio.__all__)
    assert not [name for name in asynq_aio.__all__ if not hasattr(asynq_aio, name)]


def test_every_error_is_public() -> None:
    """Whatever can be raised can be caught by a name of the package itself."""
    assert set(errors.__all__) <= set(asynq_aio.__all__)


def test_nothing_private_is_public() -> None:
    """What is not listed begins with an underscore, or is a module."""
    listed = {*asynq_aio.__all__, "annotations"}
    other = {name for name in vars(asynq_aio) if not name.startswith("_")} - listed
    assert not {name for name in other if not hasattr(vars(asynq_aio)[name], "__path__")} - {"errors", "testing"}


def test_the_version_is_that_of_the_installed_package() -> None:
    """It stands in pyproject.toml only."""
    assert asynq_aio.__version__ == importlib.metadata.version("asynq_aio")
