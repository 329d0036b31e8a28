"""What every kernel is held to: the problems (cases) and the three checks (numerics)."""
