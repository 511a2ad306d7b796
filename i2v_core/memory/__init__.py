"""Memory: count it (meter), measure a stage (stage_meter), know the device (device)."""
