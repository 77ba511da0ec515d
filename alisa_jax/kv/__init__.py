"""What is stored of the past: codecs, the store, the working set and the state of one layer."""
