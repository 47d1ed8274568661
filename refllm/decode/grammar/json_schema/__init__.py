"""Which values does a JSON Schema allow? Documents of every dialect, and their boolean algebra.

Read ``shapes`` first, what a schema becomes; then ``schema_algebra`` and its definition,
``validation``. ``schema_documents`` reads dialects and references, ``inhabitation`` decides which
schemas have values.
"""
