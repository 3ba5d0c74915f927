"""Modules that hloc finds among its matchers; each holds one class."""
