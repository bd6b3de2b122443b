"""What this machine's processor can run, tried in a child process."""
