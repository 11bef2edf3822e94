"""The block-circulant operator: what the hub's copy takes whole."""
