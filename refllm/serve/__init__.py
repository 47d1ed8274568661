"""Who runs when: requests, the scheduler's plans, the memory behind them, metrics,
workloads, simulation.
"""
