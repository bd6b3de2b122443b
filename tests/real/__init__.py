"""Tests on models that others made. A package, so that its conftest is not taken for tests/'s."""
