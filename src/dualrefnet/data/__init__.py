"""From published files to batches: adapters, lesion table, protocols, image store, metadata encoder, loader."""
