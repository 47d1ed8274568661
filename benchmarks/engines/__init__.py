"""One file per engine; each runs in a process of its own, driven over a pipe by
``common.Worker``.
"""
