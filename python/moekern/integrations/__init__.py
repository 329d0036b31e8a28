"""Hooks that bring moekern into engines. Each imports its engine when it is installed, not before."""
