"""Suites that every backend of a port runs."""
