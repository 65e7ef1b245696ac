"""What runs as long as the server runs, one file each."""
