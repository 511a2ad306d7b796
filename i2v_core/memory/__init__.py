"""Memory: counting it (meter), measuring a stage (stage_meter), facts of the device (device)."""
