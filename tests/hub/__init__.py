"""Tests of named models: the cache and the pull."""
