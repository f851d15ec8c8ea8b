"""The device mesh, the layout of parameters on it, and the processes of a job."""
