"""What all scripts share: flags, checks before a run, values of a record, tables."""
