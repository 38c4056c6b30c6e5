"""Transform: means over the processes of a group."""
