"""How values of a shape are written: objects and arrays as frames of the pushdown automaton.

Read ``json_text`` first, then ``json_frames`` and ``object_frames``.
"""
