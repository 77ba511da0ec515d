"""What all scripts share: flags, checks before a run, resuming, values of a record, tables."""
