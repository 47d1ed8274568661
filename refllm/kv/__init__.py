"""Where keys and values live: caches behind the ``attend`` seam."""
