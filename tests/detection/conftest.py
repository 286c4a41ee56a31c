"""Tests of the detectors' side: they need mmdet, and mmdet needs the patches of ``detectors``
first."""

import pytest

import detectors  # noqa: F401


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache that no other test has written to."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
