"""Arrays by path on disk: written asynchronously, checked, read onto any mesh."""
