"""Measures interaction models through the engine: what they say, and when.

`streams.py` runs a stream and logs it; `metrics.py` compares the log with what was expected;
`report.py` and `plots.py` show it. Each other module is one benchmark: its data format, its runs
and its formulas. `work.py`, `machines.py` and `prediction.py` compute instead of measuring: what a
pass consists of, and what it should take on a GPU. `duplex-engine eval` is the command;
docs/EVALUATION.md explains the figures.
"""
