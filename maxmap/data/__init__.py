"""Images on disk to uint8 batches (sources, decode, pipeline), and what the device does to them (augment, mix)."""
