"""Examples of agentflow; each is a package with a README of its own."""
