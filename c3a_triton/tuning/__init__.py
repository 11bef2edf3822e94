"""Choosing block sizes and backends: candidates, their times, the solver, the report. `c3a_triton.autotune` leads here.

In import order: goal, groups, costs, measurement, tile_search, solver, outcome, settings, plots, page, tuner.
"""
