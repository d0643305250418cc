"""Fixtures that several test files ask for."""

from tests.stores import folder, proxy, s3, store, undisturbed  # noqa: F401
