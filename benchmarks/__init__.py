"""Benchmarks against a floor and against LangGraph's own savers, all in one run: `make bench`."""
