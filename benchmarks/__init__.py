"""Benchmarks against LangGraph's own savers, all in one run: `make bench`."""
