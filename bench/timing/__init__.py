"""How a call is timed: cold operands (stock), the machine's limits, turns (measure), checks (problems), and all of it
as one comparison (compete); machine says on what, accelerator does it on a GPU or NPU.
"""
