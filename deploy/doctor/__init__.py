"""What is installed, what this machine can do, and what is missing: :func:`.checkup.check_up`."""
