"""The machinery: devices, optimiser, loop, checkpoints, metrics. Nothing here knows what a mask is."""
