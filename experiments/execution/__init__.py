"""Running the jobs of studies: on the devices of this machine, by Slurm or by Ray."""
