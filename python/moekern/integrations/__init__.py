"""Hooks that bring moekern into engines, and real models to try them with. Engines are imported at the first use."""
