"""Running the jobs of studies on the devices of this machine."""
