"""How a number becomes bits: uniform grids, dense bit streams, integer products. Knows
nothing of models.
"""
