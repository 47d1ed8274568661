"""Numbers and strings of JSON as regular languages: intervals, multiples, formats.

Read ``json_numbers`` first, then ``formats``.
"""
