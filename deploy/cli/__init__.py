"""The commands of a device, one file each."""
