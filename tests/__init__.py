"""Tests mirror the package; tests/harness holds what they share."""
