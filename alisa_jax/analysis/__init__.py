"""A model looked at layer by layer: attention maps, and the statistics of a calibration."""
