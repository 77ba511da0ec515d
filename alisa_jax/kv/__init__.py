"""Where tokens lie: layer state, store, ring of the newest rows, pending rows, context buckets."""
