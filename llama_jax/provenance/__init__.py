"""What a receipt holds, as JSON: made of a result, and known to nothing above it."""
