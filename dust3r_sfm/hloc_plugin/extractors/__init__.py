"""Modules that hloc finds among its extractors; each holds one class."""
